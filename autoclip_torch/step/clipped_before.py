"""Warn if gradients were clipped already when a clipper measures them."""

from collections import deque

from .warn import warn

_RECENT, _COUNT = 20, 5
"""It warns if so many of the recent norms lie next to the same limit."""

_TOLERANCE = 1e-5
"""`clip_grad_norm_` leaves the limit, apart from rounding."""


class ClippedBeforeCheck:
    """Looks for norms next to a number of one or two digits, the limit of another clip.

    They must differ: a gradient that never changes has the same norm.
    """

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_RECENT)
        self._has_warned = False

    def check(self, norm: float) -> None:
        """Check the norm of all gradients, which is on the CPU."""
        self._norms.append(norm)
        limit = float(f"{norm:.1e}")
        near = [each for each in self._norms if _is_near(each, limit)]
        if len(near) >= _COUNT and len(set(near)) > 1 and not self._has_warned:
            self._has_warned = True
            warn(
                f"the clipper measures norms of {limit:g} again and again, so the "
                "gradients are clipped or normalized before it; let this clipper act "
                "first, or leave the other out, such as clip_grad_norm_ or the "
                "clipping of the trainer; Cap(policy, max_norm) combines two limits"
            )


def _is_near(norm: float, limit: float) -> bool:
    return limit > 0 and abs(norm - limit) <= _TOLERANCE * limit
