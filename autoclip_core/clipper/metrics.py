"""The metrics of a step and of the run, with the same names in every framework."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from autoclip_core import scalars
from autoclip_core.decision import Decision
from autoclip_core.history.validation import find_invalid_value
from autoclip_core.scale import XP, Array

from .norms import combine_norms

T = TypeVar("T")


class Tally(NamedTuple):
    """The counts of a run. Rows are counted separately, so that 32 bits are enough."""

    steps: Array
    """Shape (): the number of steps."""
    observed: Array
    """Shape (rows,): steps in which the row had a gradient."""
    clipped: Array
    """Shape (rows,): steps in which the row was clipped."""
    nonfinite: Array
    """Shape (): steps in which any row was not finite."""
    skipped: Array
    """Shape (): updates that were skipped."""
    skipped_in_a_row: Array
    """Shape (): updates skipped since the last update that was not skipped."""
    dropped: Array = None
    """Shape (): steps in which any row was dropped; None if an earlier version saved
    the counts."""

    def find_problem(self) -> str:
        """Return why a loaded tally is invalid, or ""."""
        upper_bounds = {
            "observed": "steps",
            "clipped": "observed",
            "nonfinite": "steps",
            "skipped": "steps",
            "skipped_in_a_row": "skipped",
            "dropped": "steps",
        }
        problem = find_invalid_value("steps", self.steps, ">= 0", self.steps >= 0)
        for name, bound in upper_bounds.items():
            count = getattr(self, name)
            is_valid = (count >= 0) & (count <= getattr(self, bound))
            problem = problem or find_invalid_value(
                name, count, f">= 0 and at most {bound}", is_valid
            )
        return problem


class Totals(NamedTuple):
    """The norm of all finite observed rows as one row, shape (); NaN if all are NaN."""

    norm: Array
    """Before scaling."""
    norm_after: Array
    """After scaling."""


def empty_tally(rows: int, xp: XP = np) -> Tally:
    """Return the tally before the first step."""
    shapes: list[tuple[int, ...]] = [(), (rows,), (rows,), (), (), (), ()]
    return Tally(*(xp.zeros(shape, dtype=xp.int32) for shape in shapes))


def empty_decision(rows: int, xp: XP = np) -> Decision:
    """Return the decision before the first step: no norm, no threshold, scale 1."""
    norm, threshold, scale = (
        xp.full((rows,), value, dtype=xp.float32)
        for value in (float("nan"), float("inf"), 1.0)
    )
    no = scale == 0
    return Decision(norm, threshold, scale, no, ~no, no, no)


def count_step(tally: Tally, decision: Decision, xp: XP = np) -> Tally:
    """Return the tally after one more step."""
    if xp is np and decision.norm.shape == (1,):
        decision, xp = Decision(*(field[0] for field in decision)), scalars

    def as_count(flags: Array) -> Array:
        # NumPy adds flags to int32 as they are; a cast takes longer than the sum.
        return flags if xp.int32 is np.int32 else xp.asarray(flags, dtype=xp.int32)

    skipped = as_count(xp.any(decision.skipped))
    return Tally(
        tally.steps + 1,
        tally.observed + as_count(was_observed(decision)),
        tally.clipped + as_count(decision.clipped),
        tally.nonfinite + as_count(xp.any(~decision.finite)),
        tally.skipped + skipped,
        (tally.skipped_in_a_row + 1) * skipped,
        tally.dropped + as_count(xp.any(decision.dropped)),
    )


def was_observed(decision: Decision) -> Array:
    """Return which rows had a gradient; other rows have norm NaN and finite True."""
    is_number = decision.norm == decision.norm
    return is_number | ~decision.finite


def compute_totals(
    decision: Decision, xp: XP = np, *, norm: str = "l2", sizes: Array = None
) -> Totals:
    """Return the norm of all rows as one row.

    Rows that are not finite are left out. If no other row was observed, the norm is
    NaN.

    Args:
      decision: the decision of a step.
      xp: the array namespace; it must also have `max`.
      norm: the norm of each row, as in `combine_norms`.
      sizes: with "rms", the number of elements of each row, shape (rows,).
    """
    measured = was_observed(decision) & decision.finite
    has_no_norm = xp.any(~decision.finite) & ~xp.any(measured)
    norms = xp.where(measured, decision.norm, 0.0)
    sizes = None if sizes is None else xp.where(measured, sizes, 0.0)
    before_and_after = (
        combine_norms(n, norm, sizes=sizes, xp=xp)
        for n in (norms, norms * decision.scale)
    )
    return Totals(*(xp.where(has_no_norm, float("nan"), n) for n in before_and_after))


def compute_metrics(
    decision: Decision,
    tally: Tally,
    xp: XP = np,
    *,
    totals: Totals | None = None,
    other_clippers: int = 0,
) -> dict[str, Array]:
    """Return the metrics of the last step and of the run, each a number.

    | name                  | over several rows                                       |
    |-----------------------|---------------------------------------------------------|
    | clip/norm             | the norm of all finite observed rows as one row         |
    | clip/threshold        | the median of the finite thresholds, else +inf          |
    | clip/norm_after       | as clip/norm, after scaling                             |
    | clip/scale            | norm after / norm before; 1 for a norm of 0             |
    | clip/clipped          | fraction of the observed rows that were clipped         |
    | clip/clip_rate        | the same fraction over the run                          |
    | clip/nonfinite_total  | steps with any row that was not finite                  |
    | clip/skipped_total    | updates that were skipped                               |
    | clip/dropped_total    | steps with any row that was dropped                     |
    | clip/steps            | steps                                                   |
    | clip/rows             | the number of rows                                      |
    | clip/other_clippers   | `other_clippers`, if there are any                      |

    Args:
      decision: the last decision.
      tally: the counts of the run, including this decision.
      xp: the array namespace, as in `decide`; it must also have `sort` and `max`.
      totals: the result of `compute_totals`; by default that of l2 norms.
      other_clippers: the number of other clippers that may clip the same gradients
        before this one. `ClipLog` then reports no clip before this one.
    """
    observed = was_observed(decision)
    total, total_after = totals or compute_totals(decision, xp)
    is_zero = total == 0
    scale = xp.where(is_zero, 1.0, total_after) / xp.where(is_zero, 1.0, total)
    metrics = {
        "clip/norm": total,
        "clip/threshold": _median(decision.threshold, xp),
        "clip/scale": scale,
        "clip/norm_after": total_after,
        "clip/clipped": _fraction(
            xp.where(decision.clipped, 1, 0), xp.where(observed, 1, 0), xp
        ),
        "clip/clip_rate": _fraction(tally.clipped, tally.observed, xp),
        "clip/nonfinite_total": tally.nonfinite,
        "clip/skipped_total": tally.skipped,
        "clip/dropped_total": tally.dropped,
        "clip/steps": tally.steps,
        "clip/rows": xp.full((), decision.norm.shape[0], dtype=xp.int32),
    }
    if other_clippers:
        metrics["clip/other_clippers"] = xp.full((), other_clippers, dtype=xp.int32)
    return metrics


def name_update_metrics(metrics: dict[str, T]) -> dict[str, T]:
    """Return the metrics under the names of an update clipper.

    `clip/norm` becomes `clip/update_norm`, so that one run can log the metrics of its
    gradients and those of its updates.

    >>> name_update_metrics({"clip/norm": 5.0, "clip/scale/layer.weight": 0.5})
    {'clip/update_norm': 5.0, 'clip/update_scale/layer.weight': 0.5}
    """
    return {
        name.replace("clip/", "clip/update_", 1): value
        for name, value in metrics.items()
    }


def compute_row_metrics(
    names: Sequence[str], decision: Decision, tally: Tally, xp: XP = np
) -> dict[str, Array]:
    """Return norm, threshold, scale and clip rate of every row, each a number.

    Their names are `clip/norm/<name>`, `clip/threshold/<name>` and so on.
    """
    columns = {
        "norm": decision.norm,
        "threshold": decision.threshold,
        "scale": decision.scale,
        "clip_rate": tally.clipped / xp.maximum(tally.observed, 1),
    }
    return {
        f"clip/{kind}/{name}": value
        for kind, column in columns.items()
        for name, value in zip(names, column, strict=True)
    }


def _median(thresholds: Array, xp: XP) -> Array:
    """Return the median of the finite thresholds; +inf if there are none."""
    if thresholds.shape[0] == 0:
        return xp.full((), float("inf"), dtype=xp.float32)
    finite = xp.isfinite(thresholds)
    ordered = xp.sort(xp.where(finite, thresholds, float("inf")))
    count = xp.sum(xp.where(finite, 1, 0))
    below = xp.where(count > 0, count - 1, count) // 2
    low, high = (xp.take(ordered, index, axis=0) for index in (below, count // 2))
    return 0.5 * low + 0.5 * high


def _fraction(part: Array, counts: Array, xp: XP) -> Array:
    """Return sum(part) / sum(counts); 0 if the sum of the counts is 0."""
    total = xp.sum(counts)
    return xp.sum(part) / xp.where(total > 0, total, 1)
