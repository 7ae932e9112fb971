"""What a run recorded: a few numbers per step, a summary with advice, a picture.

| of a step of several rows | is kept                                           |
|---------------------------|---------------------------------------------------|
| norm                      | root of the sum of squares of the finite norms    |
| threshold                 | the median finite one; +inf where no row has one  |
| scale                     | norm after / norm before; 1 where both are 0      |
| clipped                   | clipped rows / observed rows, in [0, 1]           |
| finite                    | False if an observed norm is NaN or infinite      |

A row that was not observed (norm NaN, finite True) counts for nothing. A step without
any finite norm keeps the NaN or infinity as its norm, with scale NaN and clipped 0.
"""

import math
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from .checks import message
from .log_plot import draw
from .log_summary import (
    Summary,
    advise_on_nonfinite,
    advise_on_rate,
    mean,
    number,
    percent,
)

Array = npt.NDArray[Any]

FIELDS = ("norm", "threshold", "scale", "clipped", "finite")

STEP = np.dtype(
    {"names": [*FIELDS, "skipped"], "formats": ["f8", "f8", "f8", "f4", "?", "?"]},
    align=True,
)
"""What is kept of a step: 32 bytes."""


class ClipLog:
    """Collects what a clipper did, step by step, for a summary and a picture.

    A step takes 32 bytes, however many rows it has. The store doubles when it is full,
    so 10^6 steps take 32 to 64 MB, and half as much again while it is copied.

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

    def __init__(self) -> None:
        self._store = np.empty(512, STEP)
        self._count = 0
        self._rows = 0  # the most rows a step had

    def record(
        self,
        decision: object = None,
        *,
        norm: object = None,
        threshold: object = None,
        scale: object = None,
        clipped: object = None,
    ) -> None:
        """Add one step: a decision, or plain numbers from any clip.

        Args:
          decision: what `decide()` or a clipper's `step()` returned: an object with the
            fields norm, threshold, scale, clipped, finite and perhaps skipped, each
            with one entry per row (NumPy arrays, or tensors on the CPU).
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
        numbers = dict(norm=norm, threshold=threshold, scale=scale, clipped=clipped)
        given = {name: value for name, value in numbers.items() if value is not None}
        if decision is not None and given:
            raise ValueError(
                "record takes a decision or numbers, got a decision and "
                f"{', '.join(given)}; leave one of them out"
            )
        rows = from_numbers(given) if decision is None else from_decision(decision)
        step = reduce_rows(rows)
        if self._count == len(self._store):
            grown = np.empty(2 * self._count, STEP)
            grown[: self._count] = self._store
            self._store = grown
        self._store[self._count] = step
        self._count += 1
        self._rows = max(self._rows, rows["norm"].size)

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return self._count

    def __repr__(self) -> str:
        """Return the number of recorded steps."""
        return f"<ClipLog of {self._count} steps>"

    @property
    def norms(self) -> Array:
        """The norm of each step before clipping; NaN or inf where none was finite."""
        return self._column("norm")

    @property
    def thresholds(self) -> Array:
        """The threshold of each step; +inf where there was none."""
        return self._column("threshold")

    @property
    def scales(self) -> Array:
        """Norm after / norm before of each step; NaN where no norm was finite."""
        return self._column("scale")

    @property
    def clipped(self) -> Array:
        """The fraction of each step's observed rows that was clipped."""
        return self._column("clipped")

    @property
    def finite(self) -> Array:
        """False where a norm of the step was NaN or infinite."""
        return self._column("finite")

    @property
    def skipped(self) -> Array:
        """True where the whole update was cancelled."""
        return self._column("skipped")

    def _column(self, name: str) -> Array:
        """Return one number of each step so far, as a read-only view."""
        column = self._store[name][: self._count]
        column.flags.writeable = False
        return column

    def summary(self) -> Summary:
        """Return totals, rates and advice; rates are over steps with a finite norm.

        >>> log = ClipLog()
        >>> for step in range(200):
        ...     log.record(norm=4.0 if step % 10 == 0 else 1.0, threshold=2.0)
        >>> print(log.summary())
        total steps       200 (200 with a finite norm)
        clipping rate     10 %
        mean scale        0.95
        mean norm         1.3
        max norm          4
        threshold now     2
        non-finite steps  0
        skipped steps     0
        Stabiliser (5 to 25 %): clipping rate 10 % over 200 steps, mean scale 0.95.
        """
        measured = np.isfinite(self.norms)
        norms, scales = self.norms[measured], self.scales[~np.isnan(self.scales)]
        clipped, thresholds = self.clipped[measured], self.thresholds[measured]
        return Summary(
            steps=len(self),
            measured=norms.size,
            clip_rate=mean(clipped),
            mean_scale=mean(scales),
            mean_norm=mean(norms),
            max_norm=float(norms.max()) if norms.size else math.nan,
            nonfinite=int(np.sum(~self.finite)),
            skipped=int(np.sum(self.skipped)),
            threshold=float(self.thresholds[-1]) if len(self) else math.nan,
            advice=(
                *advise_on_rate(clipped, np.isfinite(thresholds), mean(scales)),
                *advise_on_nonfinite(int(np.sum(~self.finite)), len(self)),
            ),
        )

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
        """
        told = self.summary()
        title = (
            f"Clipping rate {percent(told.clip_rate)}, mean scale "
            f"{number(told.mean_scale)}, {told.steps} steps"
        )
        return draw(self._store[: self._count], title, self._rows > 1, path)


def from_numbers(given: dict[str, object]) -> dict[str, Array]:
    """Return plain numbers as a step of one row, with what follows from them."""
    if not {"norm", "threshold"} <= given.keys():
        raise ValueError(
            "record needs a decision, or both norm and threshold, got "
            f"{', '.join(given) or 'nothing'}; where there is no threshold, "
            "write threshold=float('inf')"
        )
    rows = {name: as_floats(name, value) for name, value in given.items()}
    for name, array in rows.items():
        if array.size != 1:
            way_out = "for several rows, give a decision"
            raise ValueError(message(name, "one number", given[name], way_out))
        rows[name] = array.reshape(1)
    norm, threshold = rows["norm"], rows["threshold"]
    clipped = norm > threshold
    scale = np.where(clipped, threshold / np.where(clipped, norm, 1.0), 1.0)
    return {"scale": scale, "clipped": clipped, "finite": np.isfinite(norm)} | rows


def from_decision(decision: object) -> dict[str, Array]:
    """Return the fields of a decision as arrays of one shape."""
    names = [name for name in (*FIELDS, "skipped") if hasattr(decision, name)]
    missing = [name for name in FIELDS if name not in names]
    if missing:
        raise TypeError(
            f"decision must have the fields {', '.join(FIELDS)}, got a "
            f"{type(decision).__name__} without {', '.join(missing)}; "
            "plain numbers go in as norm=..., threshold=..."
        )
    rows = {name: as_floats(name, getattr(decision, name)) for name in names}
    shapes = {name: array.shape for name, array in rows.items()}
    if len(set(shapes.values())) > 1 or rows["norm"].ndim > 1:
        raise ValueError(
            f"decision's fields must all have the shape (rows,), got {shapes}; "
            "give each field one entry per row"
        )
    return rows


def as_floats(name: str, value: object) -> Array:
    """Return real numbers as float64, with at least one dimension."""
    try:
        if hasattr(value, "detach"):  # a torch tensor: of bfloat16, or on a device
            value = value.detach().cpu().double()
        array = np.asarray(value)
        if array.dtype.kind in "OSUMmc":
            raise TypeError(f"dtype {array.dtype}")
        array = np.atleast_1d(array).astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be real numbers that NumPy can read, got "
            f"{type(value).__name__} ({error}); give plain numbers or arrays"
        ) from error
    rule, wrong = ">= 0", array < 0  # NaN has its meaning, but not for a fraction
    if name == "clipped":
        rule, wrong = "in [0, 1]", ~((array >= 0) & (array <= 1))
    if wrong.any():
        raise ValueError(message(name, rule, float(array[wrong][0]), ""))
    return array


def reduce_rows(rows: dict[str, Array]) -> tuple[float | bool, ...]:
    """Reduce the rows of one step to a `STEP`, by the table at the top of this file."""
    norm, finite = rows["norm"], rows["finite"] != 0
    observed = ~(np.isnan(norm) & finite)
    good = finite & np.isfinite(norm)
    threshold = median(rows["threshold"][np.isfinite(rows["threshold"])])
    skipped = "skipped" in rows and bool(rows["skipped"].any())
    flags = bool((good == observed).all()), skipped
    if not good.any():
        lost = float(norm[observed].max()) if observed.any() else math.nan
        return lost, threshold, math.nan, 0.0, *flags
    largest = float(norm[good].max())
    share = norm[good] / largest if largest else np.ones(good.sum())
    before = root_sum_squares(share)
    scale = root_sum_squares(rows["scale"][good] * share) / before if largest else 1.0
    clipped = float(rows["clipped"][good].sum() / observed.sum())
    return largest * before, threshold, scale, clipped, *flags


def median(values: Array) -> float:
    """Return the median of finite values; +inf of nothing."""
    if not values.size:
        return math.inf
    middle = [(values.size - 1) // 2, values.size // 2]
    return float((np.partition(values, middle)[middle] / 2).sum())


def root_sum_squares(values: Array) -> float:
    """Return the root of the sum of squares of values >= 0, of which none overflows."""
    largest = float(values.max())
    return largest * math.sqrt(((values / largest) ** 2).sum()) if largest else 0.0
