"""The columns of a log: one value per stored step."""

from .step import Array
from .store import Store


class StepColumns:
    """Returns a field of the stored steps as an array."""

    _store: Store

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

    def _column(self, name: str) -> Array:
        """Return a read-only copy of one field of the stored steps."""
        column = self._store.steps()[name].copy()
        column.flags.writeable = False
        return column
