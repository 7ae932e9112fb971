"""Some gradients at one moment: are they the same at a later one?"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from autoclip_torch.gradients.dtensor import read_values


class GradientVersions:
    """The version numbers of gradients: each changes if it is written or replaced."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Note the gradients that exist."""
        self._gradients = [
            (index, TensorWeakRef(gradient), gradient._version)
            for index, parameter in enumerate(parameters)
            if (gradient := parameter.grad) is not None
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
        self._values = [value.clone() for value in read_gradients(parameters)]

    def are_same(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the values are the same. On an accelerator, this waits."""
        return are_equal(self._values, read_gradients(parameters))


def read_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the first values of the gradients that exist."""
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
