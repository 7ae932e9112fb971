"""Notice that ranks sum their gradients by hand after the clip."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .gradient_samples import GradientValues, GradientVersions

_CYCLES = 5
"""So many updates are observed. The result is read as many updates later, so that a
device has it."""

_GROWN = 3
"""The gradients must have grown in so many of them."""


class SumCheck:
    """Whether `all_reduce` adds to gradients between a clip and the update.

    It writes to them without a new version, unlike what adds noise on purpose. A mean
    over the ranks exceeds no threshold.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self._before: tuple[GradientVersions, GradientValues] | None = None
        self._grown: list[list[Tensor]] = []
        self._cycles = 0

    def end_clip(self, samples: Sequence[Tensor]) -> None:
        """Note the gradients after a clip."""
        if self._cycles < _CYCLES and _has_several_ranks():
            self._before = GradientVersions(samples), GradientValues(samples)

    def has_grown(self, samples: Sequence[Tensor]) -> bool:
        """Return whether the gradients had grown before the first updates."""
        self._cycles += 1
        before, self._before = self._before, None
        if before is not None and before[0].are_same(samples):
            self._grown.append(before[1].have_grown(samples))
        return self._cycles == 2 * _CYCLES and sum(map(any, self._grown)) >= _GROWN


def _has_several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
