"""How gradients change between two places of a loop, in several steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoclip_torch.gradients.layout import as_real
from autoclip_torch.gradients.transfer import start_reading

from .gradient_samples import read_gradients


class Change(NamedTuple):
    """How the values of gradients have changed."""

    factor: float
    """The multiple of the earlier values that is nearest to the later ones."""
    cosine: float
    """1 if they are a multiple of the earlier values."""
    growth: float
    """The ratio of the norms."""


class Changes:
    """Copies of the first values of gradients, at both places, in each step."""

    def __init__(self) -> None:
        """Start without a step."""
        self._before: list[Tensor] = []
        self._pairs: dict[Any, list[tuple[int, Tensor, Tensor]]] = {}
        self.steps = 0

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Copy the gradients at the first place."""
        self._before = list(map(_copy, read_gradients(parameters)))

    def end(self, parameters: Sequence[Tensor]) -> bool:
        """Copy them at the second place. Return whether they can be compared."""
        before, self._before = self._before, []
        after = list(map(_copy, read_gradients(parameters)))
        if not before or list(map(len, before)) != list(map(len, after)):
            return False
        for x, y in zip(before, after, strict=True):
            # The gradients of copies may lie on another device.
            triple = self.steps, x, y.to(x.device)
            self._pairs.setdefault((x.device, len(x)), []).append(triple)
        self.steps += 1
        return True

    def compare(self) -> Callable[[], list[Change]]:
        """Start to compare the gradients of all steps.

        Returns:
          A function that returns the results. Until then, nothing waits for a device.
        """
        reads = [_multiply(triples) for triples in self._pairs.values()]

        def read() -> list[Change]:
            sums = np.zeros((self.steps, 3))
            for steps, end_reading in reads:
                np.add.at(sums, steps, end_reading()[0].T)
            return [_describe(*each) for each in sums.tolist()]

        self._pairs = {}
        return read


def _copy(values: Tensor) -> Tensor:
    """Return a copy as a vector of float32."""
    return as_real(values).reshape(-1).to(torch.float32, copy=True)


def _multiply(
    triples: Sequence[tuple[int, Tensor, Tensor]],
) -> tuple[list[int], Callable[[], list[Any]]]:
    """Start to compute the inner products of vectors: with themselves, and of both.

    Args:
      triples: numbers of steps, each with two vectors. All have one length.
    """
    steps = [step for step, _, _ in triples]
    before = torch.stack([each for _, each, _ in triples])
    after = torch.stack([each for _, _, each in triples])
    pairs = (before, before), (before, after), (after, after)
    products = torch.stack([torch.linalg.vecdot(*pair) for pair in pairs])
    return steps, start_reading([products])


def _describe(before: float, both: float, after: float) -> Change:
    """Return the change that has these inner products; NaN is no change."""
    if not 0 < before * after < math.inf:
        return Change(math.nan, math.nan, math.nan)
    cosine = both / math.sqrt(before * after)
    return Change(both / before, cosine, math.sqrt(after / before))
