"""What `ClipLog` records: the steps, the counts of the rows, and their columns."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from autoclip_core.checks import check_count

from .row_counts import RowCounts
from .step import (
    Array,
    Step,
    read_decision,
    reduce_rows,
    rows_from_metrics,
    select_metrics,
    step_from_metrics,
    step_from_numbers,
    step_from_one_row,
    was_observed,
)
from .store import Store

TOTALS = {
    "steps": "clip/steps",
    "nonfinite": "clip/nonfinite_total",
    "skipped": "clip/skipped_total",
    "dropped": "clip/dropped_total",
}
"""The totals of the run that metrics contain, by their names in the summary.

Of decisions, only `dropped` is counted here: the stored steps do not have that field.
"""


class StepRecorder:
    """Records one step per call; `ClipLog` adds the summary, the pictures and files."""

    def __init__(
        self,
        names: Iterable[str] = (),
        *,
        every: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = {name: str(value) for name, value in (settings or {}).items()}
        self._every = check_count("every", every, 1)
        self._store = Store()
        self._rows = RowCounts(list(names))
        self._offered = 0  # steps that record() was called for
        self._recorded = 0
        self._has_several_rows = len(self._rows.names) > 1
        self._logged_totals: dict[str, int] = {}  # totals read from metrics

    def record(
        self,
        decision: object = None,
        *,
        norm: object = None,
        threshold: object = None,
        scale: object = None,
        clipped: object = None,
    ) -> None:
        """Record one step: a decision, a clipper's metrics, or numbers from any clip.

        Args:
          decision: what `decide()` or a clipper's `step()` returned: an object with the
            fields norm, threshold, scale, clipped, finite and optionally skipped and
            dropped, each with one entry per row. Or a dict of metrics with the names
            `clip/...`; `clip/update_...` is read only if it has no others. Its entries
            `clip/norm/<row>` and so on count the clips of each row. Several rows
            are combined as l2 norms; if the clipper has another norm, record its
            `metrics()`.
          norm: without a decision: the norm before clipping, >= 0; NaN or inf makes the
            step a non-finite one.
          threshold: the norm above which the step is clipped, >= 0; inf for none.
          scale: norm after / norm before, >= 0; min(1, threshold / norm) if not given.
          clipped: the fraction clipped, in [0, 1]; norm > threshold if not given.

        Raises:
          TypeError: an argument is not a number, or the decision lacks a field.
          ValueError: both a decision and numbers are given, or neither; a number is out
            of its range; the fields have different shapes. The log is then unchanged.

        >>> from autoclip_core import ClipLog
        >>> log = ClipLog()
        >>> log.record(norm=4.0, threshold=1.0)  # norm: what clip_grad_norm_ returned
        >>> float(log.scales[0])
        0.25
        """
        if self._offered % self._every:
            self._offered += 1
            return
        if decision is None:
            step = step_from_numbers(norm, threshold, scale, clipped)
        else:
            numbers = dict(norm=norm, threshold=threshold, scale=scale, clipped=clipped)
            given = [name for name, value in numbers.items() if value is not None]
            if given:
                raise ValueError(
                    "record takes a decision or numbers, got a decision and "
                    f"{', '.join(given)}; leave one of them out"
                )
            step = self._read(decision)
        self._store.add(self._offered, step)
        self._offered += 1
        self._recorded += 1

    def _read(self, decision: object) -> Step:
        """Return the step of a decision or of metrics, and count its rows."""
        if isinstance(decision, Mapping):
            metrics = select_metrics(decision)
            step = step_from_metrics(metrics)
            names, clipped, observed = rows_from_metrics(metrics)
            if len(names) > 1 or (names and self._rows.names):
                self._rows.add_named(names, clipped, observed)
                self._has_several_rows |= len(names) > 1
            self._logged_totals = {
                name: int(metrics[key])
                for name, key in TOTALS.items()
                if key in metrics
            }
            self._offered = self._logged_totals.get("steps", self._offered + 1) - 1
            return step
        if not self._rows.names and (one_row := step_from_one_row(decision)):
            self._count_dropped(getattr(decision, "dropped", False))
            return one_row
        rows = read_decision(decision)
        self._count_dropped(rows.get("dropped", False))
        step = reduce_rows(rows)
        size = rows["norm"].size
        if size > 1 or self._rows.names:
            self._rows.add(rows["clipped"], was_observed(rows))
            self._has_several_rows |= size > 1
        return step

    def _count_dropped(self, dropped: Any) -> None:
        """Count a step in which any row was dropped."""
        if np.any(dropped):
            count = self._logged_totals.get("dropped", 0)
            self._logged_totals["dropped"] = count + 1

    def _restore(self, steps: Array, about: Mapping[str, Any]) -> None:
        """Restore the steps and the first line that `write_jsonl` wrote."""
        if "past" in about:
            self._store.refill(steps, **about["past"])
        else:
            self._store.extend(steps)
        if "rows" in about:
            self._rows = RowCounts.from_dict(about["rows"])
        self._has_several_rows = len(self._rows.names) > 1
        totals = about.get("told", {}).items()
        self._logged_totals = {name: check_count(name, n, 0) for name, n in totals}
        if "totals" in about:
            self._store.totals.restore(about["totals"])
        self._recorded = self._store.totals.counts["steps"]
        self._offered = int(steps["step"].max(initial=-1)) + 1

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return self._recorded

    @property
    def steps(self) -> Array:
        """The number of each stored step, from 0; all steps until they are thinned."""
        return self._column("step")

    @property
    def norms(self) -> Array:
        """The norm of each stored step before clipping; it may be NaN or infinite."""
        return self._column("norm")

    @property
    def thresholds(self) -> Array:
        """The threshold of each stored step; +inf if there was none."""
        return self._column("threshold")

    @property
    def scales(self) -> Array:
        """Norm after / norm before of each stored step; NaN if no norm is finite."""
        return self._column("scale")

    @property
    def clipped(self) -> Array:
        """The fraction of each stored step's observed rows that was clipped."""
        return self._column("clipped")

    @property
    def finite(self) -> Array:
        """False if a norm of the step was NaN or infinite."""
        return self._column("finite")

    @property
    def skipped(self) -> Array:
        """True if the whole update was skipped."""
        return self._column("skipped")

    @property
    def names(self) -> list[str]:
        """The names of the rows in the recorded decisions; empty with a single row."""
        return list(self._rows.names)

    @property
    def row_clip_rates(self) -> Array:
        """The clip rate of each row over the run, shape (rows,)."""
        return self._rows.rates()

    def _column(self, name: str) -> Array:
        """Return a read-only copy of one field of the stored steps."""
        column = self._store.steps()[name].copy()
        column.flags.writeable = False
        return column
