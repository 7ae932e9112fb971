"""Checks of a run: another clip acts, none acts, or gradients are not finite."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .metrics import Tally

RECENT, COUNT = 20, 5
"""So many of the recent norms lie next to the same limit."""

TOLERANCE = 1e-5
"""`clip_grad_norm_` leaves the limit, apart from rounding."""

CHANGES, READS = 100, 1000
"""So often the weights change, or the metrics are read, without a step. A warm-up may
leave out the first clips, and metrics may be read for each micro-batch."""

_BAD_STEPS, _LAST_STEPS = 10, 100
"""So many steps of so many are not finite."""


def find_repeated_limit(norms: Iterable[float]) -> float | None:
    """Return the limit of another clip that norms lie next to, or None.

    5 of 20 consecutive norms lie next to the same number of one or two digits. They
    must differ as rounding errors do: the norm of a gradient that never changes is
    constant, and that of one that changes slowly rises or falls.

    Args:
      norms: norms of all gradients, before this clipper, in the order of the steps.

    >>> find_repeated_limit([0.5, 0.25, 0.3, 0.2500001, 0.25, 0.25, 0.25])
    0.25
    >>> find_repeated_limit([0.25] * 20) is None
    True
    """
    near: dict[float, deque[tuple[int, float]]] = {}
    for step, norm in enumerate(norms):
        limit = float(f"{norm:.1e}")
        if not math.isclose(norm, limit, rel_tol=TOLERANCE):
            continue
        latest = near.setdefault(limit, deque())
        latest.append((step, norm))
        while latest[0][0] <= step - RECENT:
            latest.popleft()
        if len(latest) >= COUNT and _is_noise([value for _, value in latest]):
            return limit
    return None


def _is_noise(values: list[float]) -> bool:
    """Return whether values neither stay, nor only rise, nor only fall."""
    return values not in (sorted(values), sorted(values, reverse=True))


class ClippedBeforeCheck:
    """Looks for the limit of another clip in the norms of a run; reports it once."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=RECENT)
        self._has_warned = False

    def check(self, norm: float) -> str:
        """Add the norm of all gradients; return the text of a warning, or ""."""
        self._norms.append(norm)
        limit = None if self._has_warned else find_repeated_limit(self._norms)
        if limit is None:
            return ""
        self._has_warned = True
        return (
            f"the clipper measures norms of {limit:g} again and again, so the "
            "gradients are clipped or normalized before it; let this clipper act "
            "first, or leave the other out, such as clip_grad_norm_, "
            "clip_by_global_norm or the clipping of the trainer; Cap(policy, "
            "max_norm) combines two limits"
        )


class NoStepCheck:
    """Notices that a clipper takes no step while its metrics are read; reports once."""

    def __init__(self) -> None:
        self._has_ended = False
        self._reads = self._changes = 0
        self._weights: np.ndarray[Any, Any] | None = None

    def check(
        self,
        steps: float,
        read_weights: Callable[[], np.ndarray[Any, Any]],
        way_out: str,
    ) -> str:
        """Count a read of the metrics; return the text of a warning, or "".

        Args:
          steps: the steps of the clipper. After the first one, nothing is reported.
          read_weights: returns some of the weights that it should clip.
          way_out: where the clipper must be called.

        >>> check, weights = NoStepCheck(), iter(np.arange(2 * CHANGES))
        >>> texts = [check.check(0, lambda: weight, "call it") for weight in weights]
        >>> sum(text != "" for text in texts)
        1
        """
        self._has_ended |= steps > 0
        if self._has_ended:
            self._weights = None
            return ""
        before, self._weights = self._weights, read_weights()
        if before is not None:
            self._changes += not np.array_equal(before, self._weights, equal_nan=True)
        self._reads += 1
        self._has_ended = self._changes == CHANGES or self._reads == READS
        if not self._has_ended:
            return ""
        seen = "its weights change" if self._changes else "its metrics are read"
        return (
            f"the clipper has taken no step, but {seen} again and again, so nothing is "
            f"clipped; {way_out}; or find out why a loss scale skips every step"
        )


class NonfiniteCheck:
    """Reports once if 10 of the last 100 steps are not finite.

    A loss scale that calibrates is halved at most as often.

    The check keeps two earlier counts of the run: one from 50 to 100 steps ago and one
    from at most 50 steps ago. If it runs less often, these are the counts of its last
    two runs, and it reports if a tenth of the steps between is not finite.

    Args:
      quantity: what was measured, "gradients" or "updates".
    """

    def __init__(self, quantity: str = "gradients") -> None:
        self._quantity = quantity
        self._earlier: list[tuple[int, int]] = [(0, 0), (0, 0)]
        self._has_warned = False

    def check(self, tally: Tally) -> str:
        """Return the text of a warning, or "".

        Args:
          tally: the counts of the run, on the CPU.
        """
        now = int(tally.steps), int(tally.nonfinite)
        if not self._earlier:
            self._earlier = [now, now]
        steps, nonfinite = (a - b for a, b in zip(now, self._earlier[0], strict=True))
        limit = max(_BAD_STEPS, _BAD_STEPS * steps / _LAST_STEPS)
        text = ""
        if nonfinite >= limit and not self._has_warned:
            self._has_warned = True
            text = (
                f"the {self._quantity} of {nonfinite} of the last {steps} steps were "
                "not finite and became 0, which repairs no run; look at the loss and "
                "at the data of these steps"
            )
        if now[0] - self._earlier[1][0] >= _LAST_STEPS // 2:
            self._earlier = [self._earlier[1], now]
        return text

    def ignore_earlier_steps(self) -> None:
        """Ignore the steps so far: they were observed, or belong to another run."""
        self._earlier = []
