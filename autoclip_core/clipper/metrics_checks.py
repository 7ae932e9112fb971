"""Checks of the metrics that a loop reads: another clip acts before, or none acts."""

import math
from collections import deque
from collections.abc import Iterable

RECENT, COUNT = 20, 5
"""So many of the recent norms lie next to the same limit."""

TOLERANCE = 1e-5
"""`clip_grad_norm_` leaves the limit, apart from rounding."""

READS = 100
"""A loop that reads the metrics for each micro-batch may read them often per step."""


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
        self._reads = 0

    def check(self, steps: float, way_out: str) -> str:
        """Count a read of the metrics; return the text of a warning, or "".

        Args:
          steps: the steps of the clipper. After the first one, nothing is reported.
          way_out: where the clipper must be called.

        >>> check = NoStepCheck()
        >>> texts = [check.check(0, "call clipper.step()") for _ in range(2 * READS)]
        >>> sum(text != "" for text in texts)
        1
        """
        self._reads = READS if steps else self._reads + 1
        if steps or self._reads != READS:
            return ""
        return (
            f"the clipper has taken no step, but its metrics were read {READS} times, "
            f"so nothing is clipped; {way_out}; or find out why a loss scale skips "
            "every step"
        )
