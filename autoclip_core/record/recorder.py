"""What `ClipLog` records: the steps, the counts of the rows, and their columns."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from autoclip_core.checks import check_count

from .columns import StepColumns
from .largest import LargestSteps
from .read_metrics import (
    UNOBSERVED,
    Metrics,
    read_totals,
    rows_from_metrics,
    split_metrics,
    step_from_metrics,
)
from .repeats import NewStateCheck, Repeats
from .row_counts import RowCounts
from .step import (
    Step,
    as_float,
    read_decision,
    reduce_rows,
    step_from_numbers,
    step_from_one_row,
    was_observed,
)
from .store import Store


class StepRecorder(StepColumns):
    """Records one step per call; `ClipLog` adds the summary, the pictures and files."""

    updates: Self | None
    """The log of the updates, if the metrics contain both gradients and updates."""

    _clipper: int | None = None
    _repeats = Repeats()

    def __init__(
        self,
        names: Iterable[str] = (),
        *,
        every: int = 1,
        settings: Mapping[str, Any] | None = None,
        clipper: int | None = None,
    ) -> None:
        if clipper is not None:
            check_count("clipper", clipper, 0)
        self._clipper = clipper
        self.settings = {name: str(value) for name, value in (settings or {}).items()}
        self._every = check_count("every", every, 1)
        self._store = Store()
        self._rows = RowCounts(list(names))
        self._next_step = 0
        self._recorded = 0
        self._row_count = max(1, len(self._rows.names))
        self._is_of_updates = False
        self._logged_totals: dict[str, float] = {}  # totals read from metrics
        self._unread: Callable[[], Metrics] | Metrics | None = None
        self._largest = LargestSteps()
        self._new_state = NewStateCheck()
        self.updates = None

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
            `clip/...`; `clip/norm/<row>` and so on count the clips of each row.
            `clip/update_...` is recorded in `updates`, or here if there are no others.
            Metrics have the number of the step: those of the last recorded step are
            counted as a repeat. A decision has none, so after a resume the log counts
            it from 0. Several rows are combined as l2 norms; if the
            clipper has another norm, record its `metrics()`.
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
        if self._next_step % self._every:
            self._next_step += 1
            if isinstance(decision, Mapping):
                self.read_later(decision)
            return
        if decision is None:
            step = step_from_numbers(norm, threshold, scale, clipped)
            self._largest.add(self._next_step, step)
        else:
            numbers = dict(norm=norm, threshold=threshold, scale=scale, clipped=clipped)
            given = [name for name, value in numbers.items() if value is not None]
            if given:
                raise ValueError(
                    "record takes a decision or numbers, got a decision and "
                    f"{', '.join(given)}; leave one of them out"
                )
            if isinstance(decision, Mapping):
                gradients, updates = split_metrics(decision, self._clipper)
                count = (gradients or updates).get("clip/steps", math.inf)
                steps = as_float("clip/steps", count)
                if steps in (0, self._store.last + 1):  # no update since the last call
                    norm = float((gradients or updates).get("clip/norm", math.nan))
                    _warn(self._new_state.check_repeat(steps, norm))
                    self._next_step = int(steps)
                    self._repeats = self._repeats.add()
                    return
                step = self._read_metrics(gradients, updates)
            else:
                step = self._read(decision)
        _warn(self._new_state.begin_step(self._next_step, float(step.norm)))
        self._add(step)

    def read_later(self, metrics: Callable[[], Metrics] | Metrics) -> None:
        """Keep the metrics of a step that is not recorded, for the totals of the run.

        They are read when the totals are needed, such as for a summary. `MetricsLogger`
        calls this on steps that it does not log.

        Args:
          metrics: the metrics, or a function that returns them.

        >>> from autoclip_core import ClipLog
        >>> log = ClipLog()
        >>> log.record({"clip/norm": 1.0, "clip/threshold": 2.0, "clip/steps": 1})
        >>> log.read_later({"clip/steps": 50})
        >>> log.summary().steps, len(log)
        (50, 1)
        """
        self._unread = metrics

    def _add(self, step: Step) -> None:
        """Store one step under the next number."""
        self._store.add(self._next_step, step)
        self._next_step += 1
        self._recorded += 1
        self._repeats = self._repeats._replace(latest=0)

    def _read(self, decision: object) -> Step:
        """Return the step of a decision, and count its rows."""
        if not self._rows.names and (one_row := step_from_one_row(decision)):
            self._largest.add(self._next_step, one_row)
            return one_row
        rows = read_decision(decision)
        step = reduce_rows(rows)
        size = rows["norm"].size
        if size > 1 or self._rows.names:
            self._rows.add(rows["clipped"], was_observed(rows))
            self._row_count = max(self._row_count, size)
        if self._has_several_rows:
            self._largest.add_rows(self._next_step, step, rows, self._rows.names)
        else:
            self._largest.add(self._next_step, step)
        return step

    def _read_metrics(self, gradients: Metrics, updates: Metrics) -> Step:
        """Return the step of metrics; the step of updates goes into their log."""
        has_both = bool(gradients) and "clip/norm" in updates
        step = step_from_metrics(gradients or updates)
        update = step_from_metrics(updates) if has_both else UNOBSERVED
        self._is_of_updates = not gradients
        step = self._keep_totals(gradients or updates, step)
        if has_both and not self._recorded:
            self.updates = self._make_update_log()  # type: ignore[assignment]
        if self.updates is not None:
            # Both logs have the same steps, so that a file has one line for both.
            if has_both:
                update = self.updates._keep_totals(updates, update)
            self.updates._next_step = self._next_step
            self.updates._add(update)
        return step

    def _make_update_log(self) -> Self:
        log = type(self)(settings=self.settings)
        log._is_of_updates = True
        return log

    def _keep_totals(self, metrics: Metrics, step: Step) -> Step:
        """Keep the totals of the run; return the step with the flag `dropped`."""
        rows = rows_from_metrics(metrics)
        before, totals = self._logged_totals, read_totals(metrics)
        self._logged_totals, self._unread = totals, None
        self._next_step = int(totals.get("steps", self._next_step + 1)) - 1
        if totals.get("steps") == before.get("steps", 0) + 1:
            is_dropped = totals.get("dropped", 0) > before.get("dropped", 0)
            step = step._replace(dropped=is_dropped)
        if rows and (len(rows.names) > 1 or self._rows.names):
            self._rows.add_named(rows.names, rows.clipped, rows.observed)
        count = len(rows.names) if rows else int(metrics.get("clip/rows", 1))
        self._row_count = max(self._row_count, count)
        ratios = None
        if self._has_several_rows:
            before_by_after = 1 / step.scale if step.scale > 0 else 0.0
            ratios = rows.ratios if rows else {"": before_by_after}
        self._largest.add(self._next_step, step, ratios)
        return step

    def _read_totals(self) -> None:
        """Read the totals of the last step that was not recorded."""
        metrics, self._unread = self._unread, None
        if metrics is None:
            return
        try:
            values = metrics() if callable(metrics) else metrics
            pair = split_metrics(values, self._clipper)
            totals, updates = read_totals(pair[0] or pair[1]), read_totals(pair[1])
        except RuntimeError:  # a later step of JAX has reused the memory of the arrays
            return
        self._logged_totals = totals
        self._next_step = int(totals.get("steps", self._next_step))
        if self.updates is not None:
            self.updates._logged_totals = updates

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle, without a reference to a clipper."""
        self._read_totals()
        return self.__dict__

    def _run_totals(self) -> dict[str, float]:
        """Return the totals of the run, also of steps that were not recorded."""
        self._read_totals()
        totals = self._logged_totals
        if self._next_step > max(self._recorded, totals.get("steps", 0)):
            return totals | {"steps": self._next_step}
        return totals

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return self._recorded

    def __bool__(self) -> bool:
        """Return True, also for an empty log: `if log:` asks whether there is one."""
        return True

    @property
    def _has_several_rows(self) -> bool:
        """Whether the norm of a step is that of several rows, each with a threshold."""
        return self._row_count > 1


def _warn(text: str) -> None:
    """Warn in `record`, if the text is not ""."""
    if text:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
