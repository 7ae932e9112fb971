"""A quantile of past norms: of a window (AutoClip), or tracked in one number."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_count, check_flag, check_positive, check_quantile
from autoclip_core.history import full, window
from autoclip_core.history.validation import find_invalid_value
from autoclip_core.policy import Limit, Policy, select_rows
from autoclip_core.scale import Array


@dataclass(frozen=True, repr=False)
class Quantile(Policy):
    """Clip to the q-quantile of the last H norms: T = R = quantile(window, q).

    The quantile is linear, as `np.quantile`. A fraction 1 - q of stationary norms is
    clipped: q = 0.9 clips 10 % of the steps. The paper's "percentile p" is q = p / 100,
    so its p = 10 clips 90 % of them; to have the paper's rule, write
    `Quantile(0.1, history_length=None, include_current=True)`.

    The norms are recorded raw, and there is no choice: a quantile that is fed with
    clipped norms can only fall, never rise.

    Args:
      quantile: q, in [0, 1].
      history_length: H, steps that are remembered, >= 1; None remembers all (NumPy, and
        plain tensors of PyTorch on the CPU).
      include_current: whether the current norm belongs to the window that limits it.

    Raises:
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
        object.__setattr__(self, "quantile", check_quantile("quantile", self.quantile))
        length = check_history_length(self.history_length)
        object.__setattr__(self, "history_length", length)
        check_flag("include_current", self.include_current)

    @property
    def expected_clip_rate(self) -> float:
        """1 - q, on stationary norms."""
        return round(1 - self.quantile, 12)

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
        """Return the quantile of the window."""
        if self.include_current:
            state = with_current(self._memory, state, norms, xp)
        threshold = self._memory.quantile(state, self.quantile, xp)
        return Limit(threshold, threshold)

    def record(self, state: Any, norms: Array, limit: Limit, xp: Any = np) -> Any:
        """Return the window after the raw norm."""
        return self._memory.push(state, norms, xp)

    @property
    def _memory(self) -> Any:
        """What owns the state: the last norms, or all of them."""
        return full if self.history_length is None else window


class Tracked(NamedTuple):
    """The state of `StreamingQuantile`."""

    level: Array
    """C, shape (rows,): the tracked quantile; +inf before the first norm."""

    def find_problem(self) -> str:
        """Return what is wrong with a level that was read from somewhere, or ""."""
        return find_invalid_value("level", self.level, "> 0", self.level > 0)


@dataclass(frozen=True, repr=False)
class StreamingQuantile(Policy):
    """Clip to a quantile that is tracked in one number per row: T = R = C.

    The first norm sets C; each later norm n moves it by a fixed ratio,

        C <- C * exp(-rate * (1[n <= C] - q))

    which is integral control of the clip rate. Over any T steps after the first,
    clip rate = (1 - q) + ln(C_T / C_0) / (rate * T), exactly. A single norm, however
    large, moves C by a factor of at most exp(rate * q). This is the policy for
    thousands of rows: a window of 1000 takes 2000 times the memory.

    Args:
      quantile: q, in [0, 1].
      rate: the step of ln C, > 0; 0.02 to 0.2. With 0.05 and q = 0.9 the threshold
        rises by at most 4.6 % a step and falls by at most 0.5 %.

    Raises:
      ValueError: an argument is outside its range.

    >>> from autoclip_core import decide
    >>> policy = StreamingQuantile(0.5, rate=0.1)
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 0.5, 2.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(f"{decision.threshold[0]:.4f}")
    inf
    1.0000
    0.9512

    Reference:
      Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with
      adaptive clipping", 2021, https://arxiv.org/abs/1905.03871
    """

    quantile: float = 0.9
    _: KW_ONLY
    rate: float = 0.05

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "quantile", check_quantile("quantile", self.quantile))
        object.__setattr__(self, "rate", check_positive("rate", self.rate))

    @property
    def expected_clip_rate(self) -> float:
        """1 - q, on any series that stays in bounds."""
        return round(1 - self.quantile, 12)

    def init(self, rows: int, xp: Any = np) -> Tracked:
        """Return the state before the first norm."""
        return Tracked(xp.full((rows,), float("inf"), dtype=xp.float32))

    def limit(
        self,
        state: Tracked,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return the tracked quantile."""
        return Limit(state.level, state.level)

    def record(
        self, state: Tracked, norms: Array, limit: Limit, xp: Any = np
    ) -> Tracked:
        """Return the quantile after one step up or down."""
        # level + level * expm1(x), not level * exp(x): a factor near 1, rounded to
        # float32, would bias every step the same way.
        started = xp.isfinite(state.level)
        level = xp.where(started, state.level, norms)  # inf - inf would warn
        rise = level + level * math.expm1(self.rate * self.quantile)
        fall = level + level * math.expm1(-self.rate * (1 - self.quantile))
        moved = xp.where(norms > level, rise, fall)
        return Tracked(xp.where(started, moved, norms))


def check_history_length(value: int | None) -> int | None:
    """Return a positive number of steps, or None."""
    if value is None:
        return None
    way_out = "use None to remember every step"
    return check_count("history_length", value, 1, way_out)


def with_current(memory: Any, state: Any, norms: Array, xp: Any) -> Any:
    """Return the memory's state with the current norm in it, where there is one."""
    if norms is None:
        raise ValueError(
            "include_current=True needs the current norm, and a threshold was asked "
            "for before it is known; set include_current=False"
        )
    return select_rows(norms > 0, memory.push(state, norms, xp), state, xp)
