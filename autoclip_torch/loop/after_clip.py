"""Notice that gradients are multiplied, or summed over ranks, after the clip."""

from collections.abc import Callable, Sequence

from torch import Tensor

from autoclip_torch.gradients.ranks import has_other_ranks
from autoclip_torch.gradients.transfer import is_capturing

from .gradient_changes import Change, Changes
from .gradient_samples import GradientVersions

_CYCLES = 6
"""So many clips are compared with the updates. The result is read as many clips later,
so that a device has it."""

_WRONG = 3
"""The gradients must have changed in so many of them."""

_GROWTH = 1.2
"""A sum over two ranks has about 1.4 times the norm, if their gradients differ."""


class AfterClipCheck:
    """Whether gradients exceed the threshold, or have another scale than it.

    Noise that is added on purpose, zeros, and a mean over the ranks are neither.
    """

    def __init__(self) -> None:
        """Start before the first clip."""
        self._cycles = 0
        self._versions: GradientVersions | None = None
        self._changes = Changes()
        self._may_be_sums: list[bool] = []
        self._read: Callable[[], list[Change]] | None = None

    def end_clip(self, samples: Sequence[Tensor]) -> None:
        """Note the gradients after a clip."""
        self._cycles += 1
        if self._cycles > _CYCLES or any(is_capturing(each.device) for each in samples):
            return
        self._versions = GradientVersions(samples)
        self._changes.begin(samples)

    def explain(self, samples: Sequence[Tensor]) -> str | None:
        """Return what was wrong in the first updates, once.

        Args:
          samples: the same parameters, or their copies that an optimizer steps.
        """
        versions, self._versions = self._versions, None
        if versions is not None and self._changes.end(samples):
            # `all_reduce` writes without a new version, unlike what adds noise.
            is_sum = has_other_ranks() and versions.are_same(samples)
            self._may_be_sums.append(is_sum)
        if self._cycles >= _CYCLES and self._changes.steps >= _WRONG:
            self._read, self._changes = self._changes.compare(), Changes()
        if self._read is None or self._cycles < 2 * _CYCLES:
            return None
        changes, self._read = self._read(), None
        factor = _find_common_factor(changes)
        if factor is not None:
            return (
                f"the gradients were multiplied by {factor:.3g} between clipper.step() "
                "and optimizer.step(), so the threshold holds for other gradients than "
                "those of the update; what unscales or averages them must run before "
                "clipper.step(); of two limits, keep the smaller one"
            )
        if sum(map(_has_grown, self._may_be_sums, changes)) >= _WRONG:
            return (
                "gradients grew between clipper.step() and optimizer.step(), so they "
                "may exceed the threshold; what sums or replaces them, such as "
                "all_reduce, must run before clipper.step()"
            )
        return None


def _find_common_factor(changes: Sequence[Change]) -> float | None:
    """Return the number by which every update multiplied all gradients, or None."""
    factors = [change.factor for change in changes if change.cosine > 0.999]
    if len(factors) < max(_WRONG, len(changes)):
        return None
    smallest, largest = min(factors), max(factors)
    is_one = 1 / _GROWTH <= smallest <= _GROWTH
    return None if is_one or largest > 1.01 * smallest else smallest


def _has_grown(may_be_sum: bool, change: Change) -> bool:
    is_multiple = change.cosine > 0.9 and change.factor > _GROWTH
    return is_multiple or (may_be_sum and change.growth > _GROWTH)
