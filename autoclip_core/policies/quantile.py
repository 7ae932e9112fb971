"""A quantile of the last norms: AutoClip; and what policies of the last norms share."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from autoclip_core.checks import check_count, check_flag, check_quantile
from autoclip_core.history import full, window
from autoclip_core.policy import Policy, select_rows, set_fields
from autoclip_core.scale import XP, Array, Limit


class HistoryPolicy(Policy):
    """A policy whose state has the last H norms of each row, or describes all norms.

    A subclass is a dataclass with these two arguments, and has `limit`.
    """

    history_length: int | None
    include_current: bool

    _of_all: Any = full
    """The module of the state if `history_length` is None; else it is `window`."""

    def init(self, rows: int, xp: XP = np) -> Any:
        """Return the history without norms."""
        return self._history.empty(rows, self.history_length, xp)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Any:
        """Return the history with the norm before clipping."""
        return self._history.push(state, norms, xp)

    @property
    def _history(self) -> Any:
        return self._of_all if self.history_length is None else window

    def _check_history(self) -> None:
        """Check the two arguments."""
        if self.history_length is not None:
            way_out = "use None to keep the norms of all steps"
            length = check_count("history_length", self.history_length, 1, way_out)
            set_fields(self, history_length=length)
        check_flag("include_current", self.include_current)

    def _include(self, state: Any, norms: Array, xp: XP) -> Any:
        """Return the history that sets the threshold; it may have the current norms.

        Raises:
          ValueError: it must have them, and `norms` is None.
        """
        if not self.include_current:
            return state
        if norms is None:
            raise ValueError(
                "include_current=True needs the current norm, but the caller asked for "
                "a threshold before the norm is known; set include_current=False"
            )
        return select_rows(norms > 0, self._history.push(state, norms, xp), state, xp)


@dataclass(frozen=True, repr=False)
class Quantile(HistoryPolicy):
    """Clip to the q-quantile of the last H norms: T = R = quantile(window, q).

    The quantile is linear, as in `np.quantile`. If the norms are stationary, a fraction
    1 - q of the steps is clipped: q = 0.9 clips about 10 %. A row without a norm has no
    threshold (T = +inf).

    The paper's "percentile p" is q = p / 100, so its p = 10 clips 90 % of the steps.
    The paper's rule is `Quantile(0.1, history_length=None, include_current=True)` with
    one history for the whole model, which is scope "global".

    The policy always records the norm before clipping. A quantile of clipped norms
    could only fall, never rise.

    Args:
      quantile: q, in [0, 1].
      history_length: H, the number of norms in the window, >= 1. None includes all
        norms of the run, which needs NumPy or plain CPU tensors of PyTorch.
      include_current: whether the window includes the current norm when it sets the
        threshold for it.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is outside its range.

    >>> from autoclip_core import decide
    >>> policy = Quantile(0.5, history_length=100)
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 2.0, 6.0]:
    ...     state, decision = decide(policy, state, [norm])
    >>> float(decision.threshold[0]), float(decision.scale[0])
    (1.5, 0.25)

    Reference:
      Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive gradient clipping for
      source separation networks", 2020, https://arxiv.org/abs/2007.14469
    """

    quantile: float = 0.9
    _: KW_ONLY
    history_length: int | None = 1000
    include_current: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        set_fields(self, quantile=check_quantile("quantile", self.quantile))
        self._check_history()

    @property
    def expected_clip_rate(self) -> float:
        """1 - q, if the norms are stationary."""
        return round(1 - self.quantile, 12)

    @property
    def can_limit_losses(self) -> bool:
        """Whether the history is a window of past values; all norms are positive."""
        return self.history_length is not None and not self.include_current

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the quantile of the window.

        Raises:
          ValueError: `include_current` is True and `norms` is None.
        """
        state = self._include(state, norms, xp)
        threshold = self._history.quantile(state, self.quantile, xp)
        return Limit(threshold, threshold)
