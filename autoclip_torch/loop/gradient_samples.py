"""Some gradients at one moment, to compare with those of a later one."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from autoclip_torch.gradients.dtensor import read_values
from autoclip_torch.gradients.layout import as_real
from autoclip_torch.gradients.transfer import start_reading


class Change(NamedTuple):
    """How the values of gradients have changed."""

    factor: float
    """The multiple of the earlier values that is nearest to the later ones."""
    cosine: float
    """1 if they are a multiple of the earlier values."""
    growth: float
    """The ratio of the norms."""


class GradientVersions:
    """The version numbers of gradients: each changes if it is written or replaced."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Note the gradients that exist."""
        self._gradients = [
            (index, TensorWeakRef(parameter.grad), parameter.grad._version)
            for index, parameter in enumerate(parameters)
            if parameter.grad is not None
        ]

    def are_same(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the parameters have these gradients, unchanged, or none."""
        if not self._gradients:
            return all(parameter.grad is None for parameter in parameters)
        return self._count_writes(parameters) == {0}

    def are_kept(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether each was written at most once since, as by a backward pass.

        Two writes may be a `zero_grad` and a backward pass.
        """
        return self._count_writes(parameters) in ({0}, {1})

    def _count_writes(self, parameters: Sequence[Tensor]) -> set[int | None]:
        """Return how often each was written since; None if it was replaced."""
        return {
            now._version - version
            if (now := parameters[index].grad) is not None and now is reference()
            else None
            for index, reference, version in self._gradients
        }


class GradientValues:
    """The first values of gradients, which some writes change without a new version.

    These are `all_reduce` and a write to `gradient.data`.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Copy values of the gradients that exist."""
        self._values = [value.clone() for value in _read(parameters)]

    def are_same(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the values are the same. On an accelerator, this waits."""
        return are_equal(self._values, _read(parameters))

    def compare(self, parameters: Sequence[Tensor]) -> Callable[[], Change] | None:
        """Start to compare them with the values now; None without the same gradients.

        Returns:
          A function that returns the result. Until then, nothing waits for a device.
        """
        now = _read(parameters)
        shapes = [value.shape for value in now]
        if not shapes or shapes != [value.shape for value in self._values]:
            return None
        pairs = zip(self._values, now, strict=True)
        reads = [start_reading([_multiply(*pair)]) for pair in pairs]
        return lambda: _describe(sum(read()[0] for read in reads))


def _multiply(before: Tensor, after: Tensor) -> Tensor:
    """Return the inner products of two vectors: with themselves, and of both."""
    pair = before, after.to(before.device)  # copies may lie on another device
    before, after = (as_real(each).reshape(-1).float() for each in pair)
    return torch.stack([before @ before, before @ after, after @ after])


def _describe(products: Any) -> Change:
    """Return the change that has these inner products; NaN is no change."""
    before, both, after = map(float, products)
    if not 0 < before * after < math.inf:
        return Change(math.nan, math.nan, math.nan)
    cosine = both / math.sqrt(before * after)
    return Change(both / before, cosine, math.sqrt(after / before))


def _read(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [read_values(p.grad) for p in parameters if p.grad is not None]


def copy_values(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return copies of the first values of each tensor."""
    return [read_values(tensor).clone() for tensor in tensors]


def are_equal(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Return whether all values are equal; NaN equals NaN."""
    return all(
        torch.allclose(*pair, rtol=0, atol=0, equal_nan=True)
        for pair in zip(before, now, strict=True)
    )
