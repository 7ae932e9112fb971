"""The columns of a log: one value per stored step, or per row."""

from .largest import LargeStep, LargestSteps
from .row_counts import RowCounts
from .step import Array
from .store import Store


class StepColumns:
    """Returns what a log has stored: a field of each step, or a number of each row."""

    _store: Store
    _rows: RowCounts
    _largest: LargestSteps

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
    def dropped(self) -> Array:
        """True if a row of the step was dropped: set to 0, not scaled to a target."""
        return self._column("dropped")

    @property
    def largest(self) -> tuple[LargeStep, ...]:
        """The steps whose norms exceeded their thresholds most, at most 20.

        >>> from autoclip_core import ClipLog, Fixed, decide
        >>> log, policy = ClipLog(["encoder", "head"]), Fixed(2.0)
        >>> log.record(decide(policy, policy.init(rows=2), [1.0, 8.0])[1])
        >>> log.largest[0].step, log.largest[0].ratio, log.largest[0].rows
        (0, 4.0, (('head', 4.0),))
        """
        return tuple(self._largest.steps)

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
