"""Notice that ranks sum their gradients by hand after the clip."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .gradient_samples import GradientValues

_CYCLES = 5
"""So many updates are observed. The result is read as many updates later, so that a
device has it."""

_GROWN = 3
"""The gradients must have grown in so many of them."""


class SumCheck:
    """Whether gradients grow between a clip and the update, on one of several ranks.

    A second clip makes them smaller, and noise may be added on purpose by one process.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self._before: GradientValues | None = None
        self._grown: list[list[Tensor]] = []
        self._cycles = 0

    def end_clip(self, samples: Sequence[Tensor]) -> None:
        """Note the gradients after a clip."""
        if self._cycles < _CYCLES and _has_several_ranks():
            self._before = GradientValues(samples)

    def has_grown(self, samples: Sequence[Tensor]) -> bool:
        """Return whether the gradients had grown before the first updates."""
        self._cycles += 1
        before, self._before = self._before, None
        if before is not None:
            self._grown.append(before.have_grown(samples))
        return self._cycles == 2 * _CYCLES and sum(map(any, self._grown)) >= _GROWN


def _has_several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
