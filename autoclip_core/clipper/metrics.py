"""What to log of a step and of the run so far, under the same names everywhere."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.history.validation import find_invalid_value
from autoclip_core.policy import Decision
from autoclip_core.scale import Array


class Tally(NamedTuple):
    """What a run counted; per row, so that no counter outgrows 32 bits."""

    steps: Array
    """Shape (): steps taken."""
    observed: Array
    """Shape (rows,): steps in which the row had a gradient."""
    clipped: Array
    """Shape (rows,): steps in which it was clipped."""
    nonfinite: Array
    """Shape (): steps in which any row was not finite."""
    skipped: Array
    """Shape (): updates that were cancelled."""
    skipped_in_a_row: Array
    """Shape (): updates cancelled since the last one that was not."""

    def find_problem(self) -> str:
        """Return what is wrong with counts that were read from somewhere, or ""."""
        most = {
            "observed": "steps",
            "clipped": "observed",
            "nonfinite": "steps",
            "skipped": "steps",
            "skipped_in_a_row": "skipped",
        }
        found = find_invalid_value("steps", self.steps, ">= 0", self.steps >= 0)
        for name, above in most.items():
            count = getattr(self, name)
            within = (count >= 0) & (count <= getattr(self, above))
            found = found or find_invalid_value(
                name, count, f">= 0 and at most {above}", within
            )
        return found


def empty_tally(rows: int, xp: Any = np) -> Tally:
    """Return the tally of a run that has not begun."""
    shapes: list[tuple[int, ...]] = [(), (rows,), (rows,), (), (), ()]
    return Tally(*(xp.zeros(shape, dtype=xp.int32) for shape in shapes))


def count_step(tally: Tally, decision: Decision, xp: Any = np) -> Tally:
    """Return the tally after one more step."""

    def one(flags: Array) -> Array:
        return xp.asarray(flags, dtype=xp.int32)

    nonfinite = one(xp.any(~decision.finite))
    skipped = one(xp.any(decision.skipped))
    return Tally(
        tally.steps + 1,
        tally.observed + one(was_observed(decision)),
        tally.clipped + one(decision.clipped),
        tally.nonfinite + nonfinite,
        tally.skipped + skipped,
        (tally.skipped_in_a_row + 1) * skipped,
    )


def was_observed(decision: Decision) -> Array:
    """Return which rows had a gradient: the norm of the others is NaN, yet finite."""
    is_number = decision.norm == decision.norm
    return is_number | ~decision.finite


def compute_metrics(decision: Decision, tally: Tally, xp: Any = np) -> dict[str, Array]:
    """Return what to log, each a number.

    | name                  | over several rows                                       |
    |-----------------------|---------------------------------------------------------|
    | clip/norm             | root of the sum of squares of the finite observed norms |
    | clip/threshold        | the median of the finite thresholds, +inf without any   |
    | clip/norm_after       | as clip/norm, after scaling                             |
    | clip/scale            | norm after / norm before; 1 for a norm of 0             |
    | clip/clipped          | fraction of the observed rows that were clipped         |
    | clip/clip_rate        | the same over the run                                   |
    | clip/nonfinite_total  | steps with any row that was not finite                  |
    | clip/skipped_total    | updates that were cancelled                             |
    | clip/steps            | steps                                                   |

    Args:
      decision: the last decision.
      tally: the counts of the run, that decision included.
      xp: the array namespace; beside the verbs of a policy it needs `sort`.
    """
    observed = was_observed(decision)
    known = observed & decision.finite
    norms = xp.where(known, decision.norm, 0.0)
    after = norms * decision.scale
    # Rows that are not finite are counted apart; where there is no other row, the norm
    # of the step is not a number.
    lost = xp.any(~decision.finite) & ~xp.any(known)
    norm = xp.where(lost, float("nan"), _root_of_squares(norms, xp))
    norm_after = xp.where(lost, float("nan"), _root_of_squares(after, xp))
    still = norm == 0
    scale = xp.where(still, 1.0, norm_after) / xp.where(still, 1.0, norm)
    return {
        "clip/norm": norm,
        "clip/threshold": _median(decision.threshold, xp),
        "clip/scale": scale,
        "clip/norm_after": norm_after,
        "clip/clipped": _fraction(decision.clipped, observed, xp),
        "clip/clip_rate": _share(tally.clipped, tally.observed, xp),
        "clip/nonfinite_total": tally.nonfinite,
        "clip/skipped_total": tally.skipped,
        "clip/steps": tally.steps,
    }


def compute_row_metrics(
    names: Sequence[str], decision: Decision, tally: Tally
) -> dict[str, float]:
    """Return norm, threshold, scale and clip rate of every row, from NumPy arrays.

    Their names are `clip/norm/<name>`, `clip/threshold/<name>` and so on.
    """
    columns = {
        "norm": decision.norm,
        "threshold": decision.threshold,
        "scale": decision.scale,
        "clip_rate": tally.clipped / np.maximum(tally.observed, 1),
    }
    return {
        f"clip/{kind}/{name}": value
        for kind, column in columns.items()
        for name, value in zip(names, column.tolist(), strict=True)
    }


def _root_of_squares(norms: Array, xp: Any) -> Array:
    """Return sqrt(sum(n^2)) of finite norms; no square overflows."""
    if norms.shape[0] == 0:
        return xp.zeros((), dtype=xp.float32)
    largest = xp.max(norms)
    unit = xp.where(largest > 0, largest, 1.0)
    return unit * xp.sqrt(xp.sum((norms / unit) ** 2))


def _median(thresholds: Array, xp: Any) -> Array:
    """Return the median of the finite ones, +inf where there is none."""
    if thresholds.shape[0] == 0:
        return xp.full((), float("inf"), dtype=xp.float32)
    finite = xp.isfinite(thresholds)
    ordered = xp.sort(xp.where(finite, thresholds, float("inf")))
    count = xp.sum(xp.where(finite, 1, 0))
    below = xp.where(count > 0, count - 1, count) // 2
    low, high = (xp.take(ordered, place, axis=0) for place in (below, count // 2))
    return 0.5 * low + 0.5 * high


def _fraction(some: Array, among: Array, xp: Any) -> Array:
    return _share(xp.where(some, 1, 0), xp.where(among, 1, 0), xp)


def _share(part: Array, of: Array, xp: Any) -> Array:
    total = xp.sum(of)
    return xp.sum(part) / xp.where(total > 0, total, 1)
