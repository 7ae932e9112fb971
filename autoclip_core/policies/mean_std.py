"""Mean plus k standard deviations of past norms."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from autoclip_core.checks import check_count, check_flag, check_number
from autoclip_core.history import moments
from autoclip_core.history.averages import multiply_by_exp
from autoclip_core.policy import set_fields
from autoclip_core.scale import XP, Array, Limit

from .quantile import HistoryPolicy


@dataclass(frozen=True, repr=False)
class MeanStd(HistoryPolicy):
    """Clip to mean + k standard deviations of the last H norms: T = R = m + k * s.

    With `log=True`, m and s are the mean and the deviation of the logarithms, and
    T = exp(m + k * s). Gradient norms are closer to log-normal than to normal, so the
    clip rate then depends less on their spread.

    The policy always records the norm before clipping. A spike of size S in the window
    hides spikes below about k * S / sqrt(H) until it leaves the window. With
    `log=True`, or with `Quantile`, a spike does not hide others.

    Args:
      deviations: k, usually 1 to 4. It must be >= 0; with `log` any finite number is
        allowed.
      history_length: as in `Quantile`.
      log: whether to use the logarithms of the norms.
      ddof: the deviation divides by n - ddof, where n is the number of norms; >= 0.
        With fewer than max(2, ddof + 1) norms there is no threshold (T = +inf).
      include_current: as in `Quantile`.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is outside its range.

    >>> from autoclip_core import decide
    >>> policy = MeanStd(1.0, history_length=32)
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 3.0, 5.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(round(float(decision.threshold[0]), 4))
    inf
    inf
    3.4142

    Reference:
      Chen, Firat, Bapna et al., "The best of both worlds: Combining recent advances in
      neural machine translation", 2018, https://arxiv.org/abs/1804.09849 (log, k = 4)
    """

    deviations: float = 2.0
    _: KW_ONLY
    history_length: int | None = 1000
    log: bool = False
    ddof: int = 1
    include_current: bool = False

    _of_all = moments

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_flag("log", self.log)
        rule = "finite" if self.log else ">= 0 and finite"
        way_out = "" if self.log else "a threshold below the mean needs log=True"
        number = check_number(
            "deviations",
            self.deviations,
            rule,
            lambda k: math.isfinite(k) and (self.log or k >= 0),
            way_out,
        )
        set_fields(self, deviations=number, ddof=check_count("ddof", self.ddof, 0))
        self._check_history()

    @property
    def can_limit_losses(self) -> bool:
        """Whether it uses past values themselves, not their logarithms."""
        return not self.log and not self.include_current

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return mean + k standard deviations of the window.

        Raises:
          ValueError: `include_current` is True and `norms` is None.
        """
        state = self._include(state, norms, xp)
        settings = {"log": self.log, "ddof": self.ddof}
        middle, mean, std = self._history.mean_std(state, **settings, xp=xp)
        # Without a deviation there is no threshold; k * inf would be NaN for k = 0.
        has_std = xp.isfinite(std)
        offset = mean + self.deviations * xp.where(has_std, std, 0.0)
        level = middle + offset
        if self.log:
            level = multiply_by_exp(middle, offset, xp)
        threshold = xp.where(has_std, level, float("inf"))
        return Limit(threshold, threshold)
