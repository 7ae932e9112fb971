"""A threshold that follows a schedule over the recorded steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_count, check_positive, format_error
from autoclip_core.history.validation import find_invalid_value
from autoclip_core.policy import Policy, set_fields
from autoclip_core.scale import XP, Array, Limit


class Recorded(NamedTuple):
    """The state of `Scheduled`."""

    count: Array
    """Shape (rows,): k, the norms recorded so far, up to the last step."""

    def find_problem(self) -> str:
        """Return why a loaded count is invalid, or ""."""
        return find_invalid_value("count", self.count, ">= 0", self.count >= 0)


@dataclass(frozen=True, repr=False)
class Scheduled(Policy):
    """Clip to a threshold that changes linearly between given steps.

    With k the number of norms that the row has recorded, and (s, t) and (s', t') the
    neighbouring points,

        T = R = t + (t' - t) * (k - s) / (s' - s)        for s <= k <= s'

    Before the first point T is the first threshold, and after the last point it is the
    last one. For a sudden change, give two points one step apart.

    Each row has its own count. A step does not count for a row if the gradient is
    missing, zero or not finite, or if the update is skipped for a norm that is not
    finite. The count is the state, so a resumed run continues the schedule.

    Args:
      points: pairs (step, threshold), at least one. The steps are whole numbers >= 0
        and rise. The thresholds are > 0, in the unit of a gradient norm.

    Raises:
      TypeError: a step is not a whole number, or a threshold is not a number.
      ValueError: there is no point, the steps do not rise, or a value is out of range.

    >>> from autoclip_core import decide
    >>> policy = Scheduled([(0, 4.0), (2, 1.0)])
    >>> state = policy.init(rows=1)
    >>> for norm in [5.0, 5.0, 5.0, 5.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(decision.threshold[0], decision.scale[0])
    4.0 0.8
    2.5 0.5
    1.0 0.2
    1.0 0.2
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Check the points, and store them as tuples."""
        set_fields(self, points=_check_points(self.points))

    @property
    def can_limit_losses(self) -> bool:
        """True: the schedule does not depend on the sign of what it limits."""
        return True

    def init(self, rows: int, xp: XP = np) -> Recorded:
        """Return a count of 0."""
        return Recorded(xp.zeros((rows,), dtype=xp.int32))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the threshold of the present count."""
        k = state.count
        shape = tuple(k.shape)
        threshold = xp.full(shape, self.points[0][1], dtype=xp.float32)
        for (step, value), (next_step, next_value) in pairwise(self.points):
            # A weighted mean of positive numbers; a difference could cancel.
            elapsed = xp.where((k > step) & (k < next_step), k - step, 0)
            weight = xp.asarray(elapsed, dtype=xp.float32) / (next_step - step)
            level = value * (1 - weight) + next_value * weight
            threshold = xp.where(elapsed > 0, level, threshold)
            threshold = xp.where(k >= next_step, next_value, threshold)
        return Limit(threshold, threshold)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Recorded:
        """Return the next count."""
        last = self.points[-1][0]
        return Recorded(xp.where(state.count < last, state.count + 1, last))


def _check_points(points: Any) -> tuple[tuple[int, float], ...]:
    """Return the points as tuples of a step and a threshold, or raise an error."""
    rule = "pairs (step, threshold), at least one"
    way_out = "write them as in Scheduled([(0, 10.0), (1000, 1.0)])"
    if not isinstance(points, Iterable) or not (pairs := list(points)):
        raise ValueError(format_error("points", rule, points, way_out))
    checked: list[tuple[int, float]] = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(format_error("points", rule, pair, way_out))
        step = check_count("step", pair[0], 0)
        if checked and step <= checked[-1][0]:
            rule = f"above the step before it, {checked[-1][0]}"
            raise ValueError(format_error("step", rule, step, way_out))
        checked.append((step, check_positive("threshold", pair[1])))
    return tuple(checked)
