"""Some parameters, and their gradients at one moment: are they the same later?"""

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from autoclip_torch.gradients.dtensor import read_values
from autoclip_torch.step.unwrap import stepped_parameter_ids

_SAMPLES, _MOST = 2, 4
"""The gradients of so many parameters are looked at; with several optimizers, one more
for each whose parameters are not among them, up to the second number."""


def choose_samples(parameters: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """Return at most so many trained parameters, from all parts of the model.

    If all are frozen, as a critic in the step of its generator, these are returned.
    """
    leaves = [p for p in parameters if p.is_leaf]
    trained = [p for p in leaves if p.requires_grad] or leaves
    return trained[:: 1 + len(trained) // count]


class Samples:
    """Some parameters of a clipper, and which optimizers step them.

    Args:
      parameters: all parameters of the clipper.
    """

    def __init__(self, parameters: Sequence[Tensor] = ()) -> None:
        self._parameters = parameters
        self.all = choose_samples(parameters, _SAMPLES)
        self._own: weakref.WeakKeyDictionary[Optimizer, Sequence[Tensor]]
        self._own = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.all)

    @property
    def optimizers(self) -> Iterator[Optimizer]:
        """The optimizers that have stepped parameters of the clipper."""
        return (optimizer for optimizer, own in self._own.items() if own)

    @property
    def may_be_shared(self) -> bool:
        """Whether several optimizers are known, of these or of other parameters."""
        return len(self._own) > 1

    def find(self, optimizer: Optimizer) -> Sequence[Tensor] | None:
        """Return the samples that an optimizer steps; None if it is not known."""
        return self._own.get(optimizer)

    def add(self, optimizer: Optimizer) -> Sequence[Tensor]:
        """Return the samples that an optimizer steps, of which one may be new."""
        ids = stepped_parameter_ids(optimizer)
        own = [sample for sample in self.all if id(sample) in ids]
        if not own:
            own = [*choose_samples([p for p in self._parameters if id(p) in ids], 1)]
            if len(self.all) < _MOST:
                self.all = *self.all, *own
        self._own[optimizer] = own
        return own


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
