"""What a run recorded: a few numbers per step, a summary with advice, pictures."""

import math
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any

from autoclip_core.plots.figure import GRADIENT
from autoclip_core.plots.heat_map import draw_rows
from autoclip_core.plots.histogram import draw_histogram
from autoclip_core.plots.run import draw_run
from autoclip_core.record.recorder import StepRecorder
from autoclip_core.record.saved import describe, restore
from autoclip_core.record.step import Array

from .csv_jsonl import list_halves, read_csv, read_jsonl, write_csv, write_jsonl
from .formatting import format_number, format_rate
from .summary import Summary, summarise

DAMAGE = AttributeError, LookupError, OverflowError, TypeError, ValueError
"""What a wrong value in the line about a run raises."""


class ClipLog(StepRecorder):
    """Records what a clipper did, step by step, for a summary, a file and pictures.

    Memory is bounded to about 12 MB, regardless of the length of the run. The last
    131072 recorded steps are stored exactly. Older steps are thinned to an even sample
    and the highest norms. Totals are counted as the steps arrive and stay exact. Clips
    are also counted per row, to show which row is clipped. An empty log
    is true, so `if log:` asks whether there is a log.

    Args:
      names: the names of the rows, such as a clipper's `names`; otherwise "row 0",
        "row 1" and so on.
      every: record one step in `every`, >= 1. The other steps are not read, so numbers
        on an accelerator cost one transfer in `every` steps.
      settings: the settings of the run by name, such as policy and scope; the report
        shows them.
      clipper: which clipper to record, >= 0, if metrics are numbered: `clip/0/norm`.

    Raises:
      TypeError, ValueError: a number is not whole or out of range.

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

    def __repr__(self) -> str:
        """Return the number of recorded steps."""
        return f"<ClipLog of {self._recorded} steps>"

    def summary(self) -> Summary:
        """Return totals, rates and advice; rates are over steps with a finite norm.

        >>> log = ClipLog()
        >>> for step in range(200):
        ...     log.record(norm=4.0 if step % 10 == 0 else 1.0, threshold=2.0)
        >>> print(log.summary())
        total steps       200 (200 with a finite norm)
        clip rate         10 % (10 % over the last 200)
        mean scale        0.95
        mean norm         1.3
        norm quantiles    median 1, p90 1.3, p99 4
        max norm          4
        threshold now     2
        non-finite steps  0
        skipped steps     0
        Stabiliser (5 to 25 %): clip rate 10 % over 200 steps, mean scale 0.95.
        """
        return summarise(self)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw norm, threshold and clipped steps over time, on a log axis.

        With several rows, each has a threshold of its own; in its place a line shows
        the norm of all rows after clipping.

        Above 1000 steps each column of the picture covers several steps. It shows their
        smallest, median and largest norm, so no spike is lost. Norms too small for the
        axis, such as 0, are marked at its lower edge, non-finite steps at its upper
        edge. The panel below shows the clip rate over time.

        Args:
          path: where to save the picture; the suffix is the format (.png, .pdf, .svg).

        Returns:
          The `matplotlib.figure.Figure`; it is not registered with pyplot.

        Raises:
          ImportError: matplotlib is not installed.

        >>> log = ClipLog()
        >>> for norm in [1.0, 4.0]:
        ...     log.record(norm=norm, threshold=2.0)
        >>> log.plot().axes[0].get_title()
        'Clip rate 50 %, mean scale 0.75, 2 steps'
        """
        summary = self.summary()
        rate = format_rate(summary.clip_rate, summary.has_several_rows)
        scale = format_number(summary.mean_scale)
        title = f"Clip rate {rate}, mean scale {scale}, {summary.steps} steps"
        steps, highest = self._store.steps(), self._store.highest()
        return draw_run(
            *(steps, title, self._has_several_rows, path),
            highest=highest,
            label=self._norm_label(),
        )

    def plot_rows(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw the clip rate of each row over time as a heat map.

        Args:
          path: where to save the picture.

        Returns:
          The `matplotlib.figure.Figure`.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: no step with more than one row was recorded.

        >>> from autoclip_core import Fixed, decide
        >>> policy, log = Fixed(2.0), ClipLog(["encoder", "head"])
        >>> log.record(decide(policy, policy.init(rows=2), [1.0, 3.0])[1])
        >>> [label.get_text() for label in log.plot_rows().axes[0].get_yticklabels()]
        ['encoder', 'head']
        """
        if not self._rows.steps:
            raise ValueError(
                "plot_rows() must have steps of several rows, got none; record what a "
                "clipper's step() returns, or its metrics(per_row=True), at a scope "
                "other than global; a CSV has no counts of the rows"
            )
        every = max(1, round(self._next_step / self._rows.steps))
        return draw_rows(self._rows, every, path)

    def plot_histogram(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw the distribution of the norms, with a line at the current threshold.

        With several rows there is no line: the thresholds are those of single rows.

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
        threshold = math.inf if self._has_several_rows else self.summary().threshold
        return draw_histogram(self.norms, threshold, path, label=self._norm_label())

    def _norm_label(self) -> str:
        return "norm of the update" if self._is_of_updates else GRADIENT

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the stored steps as a table: step, norm, threshold, scale, flags, rows.

        A table has no totals. If the run is so long that steps were thinned, this warns
        that totals computed from the table are not those of the run.

        Args:
          path: where to write the file.

        >>> from pathlib import Path
        >>> log = ClipLog()
        >>> log.record(norm=4.0, threshold=2.0)
        >>> log.to_csv("run.csv")
        >>> print(Path("run.csv").read_text().strip())
        step,norm,threshold,scale,clipped,finite,skipped,dropped,rows
        0,4.0,2.0,0.5,1.0,1,0,0,1
        """
        steps = self._store.steps()
        if len(steps) < self._recorded:
            warnings.warn(
                f"{path} holds {len(steps)} of {self._recorded} steps, because older "
                "steps are thinned: totals computed from it are not those of the run; "
                "to_jsonl also writes the totals",
                stacklevel=2,
            )
        write_csv(path, *list_halves(self))

    def to_jsonl(self, path: str | PathLike[str]) -> None:
        """Write a line about the run (settings, rows, totals), then one line per step.

        Args:
          path: where to write the file.

        >>> from pathlib import Path
        >>> log = ClipLog(settings={"policy": "Fixed(2.0)"})
        >>> log.record(norm=1.0, threshold=2.0)
        >>> log.to_jsonl("run.jsonl")
        >>> Path("run.jsonl").read_text().splitlines()[0]
        '{"clip_log": {"settings": {"policy": "Fixed(2.0)"}, "told": {}}}'
        """
        about = {"settings": self.settings, **describe(self)}
        write_jsonl(path, about, *list_halves(self))

    @classmethod
    def from_csv(cls, path: str | PathLike[str]) -> "ClipLog":
        """Read a file that `to_csv` wrote; the log has no rows and no settings.

        Args:
          path: the file.

        Raises:
          ValueError: the file lacks a column, or a cell is not a number.
          OSError: the file cannot be read.

        >>> log = ClipLog()
        >>> log.record(norm=4.0, threshold=2.0)
        >>> log.to_csv("run.csv")
        >>> ClipLog.from_csv("run.csv").scales.tolist()
        [0.5]
        """
        about, steps = read_csv(path)
        return cls.from_steps(steps, about)

    @classmethod
    def from_jsonl(cls, path: str | PathLike[str]) -> "ClipLog":
        """Read a file that `to_jsonl` wrote.

        Args:
          path: the file.

        Raises:
          ValueError: a line is not JSON or lacks a number.
          OSError: the file cannot be read.

        >>> log = ClipLog()
        >>> log.record(norm=4.0, threshold=2.0)
        >>> log.to_jsonl("run.jsonl")
        >>> ClipLog.from_jsonl("run.jsonl").scales.tolist()
        [0.5]
        """
        about, steps = read_jsonl(path)
        return cls.from_steps(steps, about)

    @classmethod
    def from_steps(
        cls, steps: Array, about: Mapping[str, Any] | None = None
    ) -> "ClipLog":
        """Return a log that contains these steps.

        Args:
          steps: an array with the fields of `autoclip_core.record.store.STEP`.
          about: the settings, rows and totals of the run, as `to_jsonl` writes them in
            its first line.

        Raises:
          ValueError: `about` is damaged.

        >>> import numpy as np
        >>> from autoclip_core.record.store import STEP
        >>> steps = np.array([(7, 4.0, 2.0, 0.5, 1.0, True, False, False)], STEP)
        >>> ClipLog.from_steps(steps).steps.tolist()
        [7]
        """
        about = {} if about is None else about
        try:
            log = cls(settings=about.get("settings"))
            restore(log, steps, about)
        except DAMAGE as error:
            raise ValueError(
                f"the line clip_log must be as to_jsonl wrote it, got a missing or "
                f"wrong value ({error!s:.200}); delete the line to read the steps only"
            ) from error
        return log
