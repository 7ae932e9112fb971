"""Mean plus k standard deviations of past norms."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from autoclip_core.checks import check_count, check_flag, check_number
from autoclip_core.history import moments, window
from autoclip_core.policy import Limit, Policy
from autoclip_core.scale import Array

from .quantile import check_history_length, with_current


@dataclass(frozen=True, repr=False)
class MeanStd(Policy):
    """Clip to mean + k standard deviations of the last H norms: T = R = m + k * s.

    With `log=True` mean and deviation are those of the logarithms, T = exp(m + k * s):
    gradient norms are closer to log-normal than to normal, and the clip rate then
    depends less on their spread.

    The norms are recorded raw, and there is no choice. A raw spike of size S in a
    window hides spikes below about k * S / sqrt(H) until it leaves; with `log=True`, or
    with `Quantile`, it does not.

    Args:
      deviations: k, >= 0, with `log` any finite number; 1 to 4.
      history_length: H, steps that are remembered, >= 1; None remembers all (NumPy, and
        plain tensors of PyTorch on the CPU).
      log: whether to take the logarithms.
      ddof: the deviation divides by n - ddof; 0 or more. With fewer than
        max(2, ddof + 1) norms there is no threshold.
      include_current: whether the current norm belongs to the window that limits it.

    Raises:
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

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_flag("log", self.log)
        check_flag("include_current", self.include_current)
        rule = "finite" if self.log else ">= 0 and finite"
        way_out = "" if self.log else "below the mean a threshold needs log=True"
        number = check_number(
            "deviations",
            self.deviations,
            rule,
            lambda k: math.isfinite(k) and (self.log or k >= 0),
            way_out,
        )
        object.__setattr__(self, "deviations", number)
        length = check_history_length(self.history_length)
        object.__setattr__(self, "history_length", length)
        object.__setattr__(self, "ddof", check_count("ddof", self.ddof, 0))

    def init(self, rows: int, xp: Any = np) -> Any:
        """Return the empty window."""
        return self._memory.empty(rows, self.history_length, xp)

    def limit(
        self,
        state: Any,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return mean + k standard deviations of the window."""
        if self.include_current:
            state = with_current(self._memory, state, norms, xp)
        settings = {"log": self.log, "ddof": self.ddof}
        middle, mean, std = self._memory.mean_std(state, **settings, xp=xp)
        # No deviation, no threshold; k * inf would be NaN for k = 0.
        known = xp.isfinite(std)
        above = mean + self.deviations * xp.where(known, std, 0.0)
        level = middle * xp.exp(above) if self.log else middle + above
        threshold = xp.where(known, level, float("inf"))
        return Limit(threshold, threshold)

    def record(self, state: Any, norms: Array, limit: Limit, xp: Any = np) -> Any:
        """Return the window after the raw norm."""
        return self._memory.push(state, norms, xp)

    @property
    def _memory(self) -> Any:
        """What owns the state: the last norms, or the moments of all of them."""
        return moments if self.history_length is None else window
