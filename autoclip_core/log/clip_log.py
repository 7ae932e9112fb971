"""What a run recorded: a few numbers per step, a summary with advice, pictures."""

import math
import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy.typing as npt

from autoclip_core.checks import check_count
from autoclip_core.record.row_counts import RowCounts
from autoclip_core.record.step import (
    Step,
    from_decision,
    from_metrics,
    from_numbers,
    from_one_row,
    reduce_rows,
    was_observed,
)
from autoclip_core.record.store import Store

from .files import past_of, read_csv, read_jsonl, write_csv, write_jsonl
from .plot import draw, draw_histogram
from .plot_rows import draw_rows
from .summary import Summary, number, percent, summarise

Array = npt.NDArray[Any]


class ClipLog:
    """Collects what a clipper did, step by step, for a summary, a file and pictures.

    The memory is bounded, about 15 MB however long the run is: the last 131072 recorded
    steps are kept exactly, of earlier ones an even sample and the highest, and totals
    are counted as the steps come. Rows are counted apart, to tell which one is clipped.

    Args:
      names: what the rows are called, such as a clipper's `names`; otherwise "row 0",
        "row 1" and so on.
      every: record one step of so many, >= 1. Of the others nothing is read, so that a
        number on an accelerator costs one transfer in `every` steps.
      settings: what the run was, by name, for the report: the policy, the scope.

    Raises:
      TypeError, ValueError: `every` is no whole number >= 1.

    >>> import numpy as np
    >>> from autoclip_core import ClipLog, Fixed, decide
    >>> policy, log = Fixed(2.0), ClipLog()
    >>> state = policy.init(rows=2)
    >>> for norms in [[1.0, 1.0], [3.0, 4.0], [np.nan, 1.0]]:
    ...     state, decision = decide(policy, state, norms)
    ...     log.record(decision)
    >>> len(log), log.norms.round(3).tolist(), log.clipped.tolist()
    (3, [1.414, 5.0, 1.0], [0.0, 1.0, 0.0])
    >>> log.finite.tolist()
    [True, True, False]
    """

    def __init__(
        self,
        names: Iterable[str] = (),
        *,
        every: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._every = check_count("every", every, 1)
        self.settings = {name: str(value) for name, value in (settings or {}).items()}
        self._store = Store()
        self._rows = RowCounts(list(names))
        self._offered = 0  # steps that record() was called for
        self._recorded = 0
        self._several_rows = len(self._rows.names) > 1
        self._told: dict[str, int] = {}  # totals that metrics brought along

    def record(
        self,
        decision: object = None,
        *,
        norm: object = None,
        threshold: object = None,
        scale: object = None,
        clipped: object = None,
    ) -> None:
        """Take one step: a decision, a clipper's metrics, or numbers from any clip.

        Args:
          decision: what `decide()` or a clipper's `step()` returned: an object with the
            fields norm, threshold, scale, clipped, finite and perhaps skipped, each
            with one entry per row. Or a dict of metrics with the names `clip/...`.
          norm: without a decision: the norm before clipping, >= 0; NaN or inf makes the
            step a non-finite one.
          threshold: the norm above which the step is clipped, >= 0; inf for none.
          scale: norm after / norm before, >= 0; min(1, threshold / norm) if not given.
          clipped: the fraction clipped, in [0, 1]; norm > threshold if not given.

        Raises:
          TypeError: something is not a number, or the decision lacks a field.
          ValueError: both a decision and numbers, or neither; a number out of its
            range; fields of different shapes. The log is then as it was.

        >>> log = ClipLog()
        >>> log.record(norm=4.0, threshold=1.0)  # norm: what clip_grad_norm_ returned
        >>> float(log.scales[0])
        0.25
        """
        if self._offered % self._every:
            self._offered += 1
            return
        if decision is None:
            step = from_numbers(norm, threshold, scale, clipped)
        else:
            _refuse_both(norm=norm, threshold=threshold, scale=scale, clipped=clipped)
            step = self._take(decision)
        self._store.add(self._offered, step)
        self._offered += 1
        self._recorded += 1

    def _take(self, decision: object) -> Step:
        """Return the step of a decision or of metrics, and count its rows."""
        if isinstance(decision, Mapping):
            step = from_metrics(decision)
            self._told = {
                name: int(decision[key])
                for name, key in TOTALS.items()
                if key in decision
            }
            self._offered = self._told.get("steps", self._offered + 1) - 1
            return step
        if not self._rows.names and (one := from_one_row(decision)):
            return one
        rows = from_decision(decision)
        step = reduce_rows(rows)
        size = rows["norm"].size
        if size > 1 or self._rows.names:
            self._rows.add(rows["clipped"], was_observed(rows))
            self._several_rows |= size > 1
        return step

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return self._recorded

    def __repr__(self) -> str:
        """Return the number of recorded steps."""
        return f"<ClipLog of {self._recorded} steps>"

    @property
    def steps(self) -> Array:
        """The number of each kept step, from 0; all of them until steps are thinned."""
        return self._column("step")

    @property
    def norms(self) -> Array:
        """The norm of each kept step before clipping; NaN or inf if none was finite."""
        return self._column("norm")

    @property
    def thresholds(self) -> Array:
        """The threshold of each kept step; +inf where there was none."""
        return self._column("threshold")

    @property
    def scales(self) -> Array:
        """Norm after / norm before of each kept step; NaN if no norm was finite."""
        return self._column("scale")

    @property
    def clipped(self) -> Array:
        """The fraction of each kept step's observed rows that was clipped."""
        return self._column("clipped")

    @property
    def finite(self) -> Array:
        """False where a norm of the step was NaN or infinite."""
        return self._column("finite")

    @property
    def skipped(self) -> Array:
        """True where the whole update was cancelled."""
        return self._column("skipped")

    @property
    def names(self) -> list[str]:
        """The names of the rows that decisions brought; empty with a single row."""
        return list(self._rows.names)

    @property
    def row_clip_rates(self) -> Array:
        """The clip rate of each row over the run, shape (rows,)."""
        return self._rows.rates()

    def _column(self, name: str) -> Array:
        """Return one number of each kept step, as an array of its own, read-only."""
        column = self._store.kept()[name].copy()
        column.flags.writeable = False
        return column

    def summary(self) -> Summary:
        """Return totals, rates and advice; rates are over steps with a finite norm.

        >>> log = ClipLog()
        >>> for step in range(200):
        ...     log.record(norm=4.0 if step % 10 == 0 else 1.0, threshold=2.0)
        >>> print(log.summary())
        total steps       200 (200 with a finite norm)
        clipping rate     10 % (10 % over the last 200)
        mean scale        0.95
        mean norm         1.3
        norm quantiles    median 1, p90 1.3, p99 4
        max norm          4
        threshold now     2
        non-finite steps  0
        skipped steps     0
        Stabiliser (5 to 25 %): clipping rate 10 % over 200 steps, mean scale 0.95.
        """
        return summarise(self._store, self._rows, self._told)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw norm, threshold and clipped steps over time, on a log axis.

        Above 1000 steps each column of the picture stands for several and shows their
        smallest, median and largest norm, so that no spike is lost. Norms too small for
        the axis, as 0 is, are marked at its lower edge, non-finite steps at its upper
        edge. The strip below shows the clipping rate over time.

        Args:
          path: where to save the picture; the suffix is the format (.png, .pdf, .svg).

        Returns:
          The `matplotlib.figure.Figure`; pyplot does not know of it.

        Raises:
          ImportError: matplotlib is not installed.

        >>> log = ClipLog()
        >>> for norm in [1.0, 4.0]:
        ...     log.record(norm=norm, threshold=2.0)
        >>> log.plot().axes[0].get_title()
        'Clipping rate 50 %, mean scale 0.75, 2 steps'
        """
        told = self.summary()
        title = (
            f"Clipping rate {percent(told.clip_rate)}, mean scale "
            f"{number(told.mean_scale)}, {told.steps} steps"
        )
        kept, highest = self._store.kept(), self._store.highest()
        return draw(kept, title, self._several_rows, path, highest=highest)

    def plot_rows(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw which row was clipped when: a heat map of clip rates over time.

        Args:
          path: where to save the picture.

        Returns:
          The `matplotlib.figure.Figure`.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: the log has no rows: it needs decisions of more than one row.

        >>> from autoclip_core import Fixed, decide
        >>> policy, log = Fixed(2.0), ClipLog(["encoder", "head"])
        >>> log.record(decide(policy, policy.init(rows=2), [1.0, 3.0])[1])
        >>> [label.get_text() for label in log.plot_rows().axes[0].get_yticklabels()]
        ['encoder', 'head']
        """
        if not self._rows.steps:
            raise ValueError(
                "plot_rows() must have decisions of several rows, got none; record "
                "what a clipper's step() returns, at a scope other than global"
            )
        return draw_rows(self._rows, self._every, path)

    def plot_histogram(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw how the norms are distributed, and where the threshold stands now.

        Of several rows each has a threshold of its own, which says nothing about the
        norm of them together: then there is no line.

        Args:
          path: where to save the picture.

        Returns:
          The `matplotlib.figure.Figure`.

        Raises:
          ImportError: matplotlib is not installed.

        >>> log = ClipLog()
        >>> for norm in [1.0, 4.0]:
        ...     log.record(norm=norm, threshold=2.0)
        >>> log.plot_histogram().axes[0].get_title()
        'Norms of 2 steps'
        """
        threshold = math.inf if self._several_rows else self.summary().threshold
        return draw_histogram(self.norms, threshold, path)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the kept steps as a table: step, norm, threshold, scale and flags.

        Of a run so long that steps were left out a table has no totals: it warns.

        Args:
          path: where to write it.

        >>> import pathlib, tempfile
        >>> log = ClipLog()
        >>> log.record(norm=4.0, threshold=2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log.to_csv(path := pathlib.Path(folder, "run.csv"))
        ...     for line in path.read_text().split():
        ...         print(line)
        step,norm,threshold,scale,clipped,finite,skipped
        0,4.0,2.0,0.5,1.0,1,0
        """
        kept = self._store.kept()
        if len(kept) < self._recorded:
            warnings.warn(
                f"{path} holds {len(kept)} of {self._recorded} steps, the recent ones "
                "and the highest of the past: totals of such a table are not those of "
                "the run; to_jsonl writes them, too",
                stacklevel=2,
            )
        write_csv(path, kept)

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Write a line about the run (settings, rows, totals), then a line per step.

        Args:
          path: where to write them.

        >>> import pathlib, tempfile
        >>> log = ClipLog(settings={"policy": "Fixed(2.0)"})
        >>> log.record(norm=4.0, threshold=2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log.to_jsonl(path := pathlib.Path(folder, "run.jsonl"))
        ...     path.read_text().splitlines()[0]
        '{"clip_log": {"settings": {"policy": "Fixed(2.0)"}, "told": {}}}'
        """
        write_jsonl(path, self._store, self._rows, self.settings, self._told)

    @classmethod
    def from_csv(cls, path: str | PathLike[str]) -> "ClipLog":
        """Return the log of a file that `to_csv` wrote; it has no rows or settings.

        Args:
          path: the file.

        Raises:
          ValueError: the file lacks a column, or a cell is not a number.
          OSError: the file cannot be read.

        >>> import pathlib, tempfile
        >>> log = ClipLog()
        >>> log.record(norm=4.0, threshold=2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log.to_csv(path := pathlib.Path(folder, "run.csv"))
        ...     ClipLog.from_csv(path).scales.tolist()
        [0.5]
        """
        return cls.from_steps(read_csv(path))

    @classmethod
    def from_jsonl(cls, path: str | PathLike[str]) -> "ClipLog":
        """Return the log of a file that `to_jsonl` wrote.

        Args:
          path: the file.

        Raises:
          ValueError: a line is not JSON or lacks a number.
          OSError: the file cannot be read.

        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "run.jsonl")
        ...     _ = path.write_text('{"step": 0, "norm": 4.0, "threshold": 2.0}')
        ...     ClipLog.from_jsonl(path).scales.tolist()
        [0.5]
        """
        about, steps = read_jsonl(path)
        return cls.from_steps(steps, about)

    @classmethod
    def from_steps(
        cls, steps: Array, about: Mapping[str, Any] | None = None
    ) -> "ClipLog":
        """Return the log of steps that are known already.

        Args:
          steps: an array with the fields of `log_store.STEP`.
          about: the run's settings, rows and totals, as the first line of JSON lines.

        Raises:
          ValueError: what is said of the run is damaged.

        >>> import numpy as np
        >>> from autoclip_core.record.store import STEP
        >>> steps = np.array([(7, 4.0, 2.0, 0.5, 1.0, True, False)], STEP)
        >>> ClipLog.from_steps(steps).steps.tolist()
        [7]
        """
        try:
            return cls._restored(steps, about or {})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the line clip_log must be as to_jsonl wrote it, got one without or "
                f"with another {error}; delete the line, and the steps are read alone"
            ) from error

    @classmethod
    def _restored(cls, steps: Array, about: Mapping[str, Any]) -> "ClipLog":
        log = cls(settings=about.get("settings"))
        if "past" in about:
            log._store.refill(steps, **past_of(about["past"]))
        else:
            log._store.extend(steps)
        if "rows" in about:
            log._rows = RowCounts.from_plain(about["rows"])
        log._several_rows = len(log._rows.names) > 1
        log._told = dict(about.get("told", {}))
        if "totals" in about:
            log._store.totals.restore(about["totals"])
        log._recorded = log._store.totals.counts["steps"]
        log._offered = int(steps["step"].max(initial=-1)) + 1
        return log


TOTALS = {
    "steps": "clip/steps",
    "nonfinite": "clip/nonfinite_total",
    "skipped": "clip/skipped_total",
}
"""What metrics say of the whole run, by the names of the summary."""


def _refuse_both(**numbers: object) -> None:
    given = [name for name, value in numbers.items() if value is not None]
    if given:
        raise ValueError(
            f"record takes a decision or numbers, got a decision and "
            f"{', '.join(given)}; leave one of them out"
        )
