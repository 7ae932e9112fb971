"""Some gradients at one moment, to compare with those of a later one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from autoclip_torch.gradients.layout import get_stored
from autoclip_torch.gradients.sharded import get_local

_ELEMENTS = 1024
"""So many values of each gradient are copied."""

_GROWTH = 1.2
"""A sum over two ranks has about 1.4 times the norm, if their gradients differ."""


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
        pairs = zip(self._values, _read(parameters), strict=True)
        return all(
            torch.allclose(before, now, rtol=0, atol=0, equal_nan=True)
            for before, now in pairs
        )

    def have_grown(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return whether norms are clearly larger now, without waiting for a device.

        Returns:
          A flag of each gradient on the CPU, which a device may write later.
        """
        pairs = zip(self._values, _read(parameters), strict=True)
        grown = [_norm(after) > _GROWTH * _norm(before) for before, after in pairs]
        return [flag.to("cpu", non_blocking=True) for flag in grown]


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values.abs().float())
    return norm


def _read(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [read_values(p.grad) for p in parameters if p.grad is not None]


def read_values(tensor: Tensor) -> Tensor:
    """Return the first values of a tensor, or of its part on this rank."""
    return get_stored(get_local(tensor)).detach().reshape(-1)[:_ELEMENTS]
