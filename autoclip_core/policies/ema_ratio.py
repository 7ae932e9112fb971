"""A ratio to the moving average of the norm after clipping: AdaGC."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_count, check_limit, check_number
from autoclip_core.history.averages import keeps_only_last
from autoclip_core.history.validation import find_invalid_mean
from autoclip_core.policy import Policy, set_fields
from autoclip_core.scale import XP, Array, Limit


class Average(NamedTuple):
    """The state of `EmaRatio`."""

    mean: Array
    """Shape (rows,): the moving average of the norm after clipping."""
    count: Array
    """Shape (rows,): norms recorded, up to max(warmup_steps, 1)."""

    def find_problem(self) -> str:
        """Return why a loaded average is invalid, or ""."""
        return find_invalid_mean(self.mean, self.count)


@dataclass(frozen=True, repr=False)
class EmaRatio(Policy):
    """Clip to a ratio of the moving average of clipped norms: T = R = ratio * gamma.

    During the first `warmup_steps` norms of a row the threshold is `warmup_threshold`,
    and gamma is the smallest norm after clipping so far. Afterwards, with y = min(n, T)
    the norm after clipping,

        gamma <- beta * gamma + (1 - beta) * y

    So gamma rises by at most (1 - beta) * (ratio - 1) per step, 0.1 % by default. A
    tenfold rise takes about 2300 steps.

    With a ratio near 1 the policy is a soft normaliser. It clips most steps by a small
    amount: 42 % of the steps if ln n has a deviation of 0.1, and 71 % for 0.3. Use a
    ratio of 2 or 3 to clip only rare spikes.

    The paper clips the global norm during its warm-up, and it freezes a layer whose
    gradient is 0 there. This policy limits each row separately, and the average of a
    row starts at its first positive norm. For the paper's warm-up, clip the global norm
    with `Warmup(Fixed(inf), steps=100, threshold=1.0)` before this policy, whose
    `warmup_threshold` is then +inf.

    Args:
      ratio: T / gamma, > 1; usually 1.03 to 3.
      beta: the weight of the previous average, in [0, 1).
      warmup_steps: the number of norms of a row before its average sets the threshold,
        >= 0. With 0 the first norm is not limited.
      warmup_threshold: the threshold during the warm-up, > 0, in the unit of a gradient
        norm; +inf clips nothing.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is outside its range.

    >>> from autoclip_core import decide
    >>> policy = EmaRatio(2.0, beta=0.5, warmup_steps=0)
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 4.0, 4.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(decision.threshold[0], decision.scale[0])
    inf 1.0
    2.0 0.5
    3.0 0.75

    Reference:
      Wang, Li, Chen et al., "AdaGC: Enhancing LLM pretraining stability via adaptive
      gradient clipping", ICML 2026, https://arxiv.org/abs/2502.11034 (version 2)
    """

    ratio: float = 1.05
    _: KW_ONLY
    beta: float = 0.98
    warmup_steps: int = 100
    warmup_threshold: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        way_out = "with a ratio of 1 or less the threshold can only fall"
        ratio = check_number(
            "ratio", self.ratio, "> 1 and finite", lambda x: 1 < x < np.inf, way_out
        )
        beta = check_number("beta", self.beta, "in [0, 1)", lambda x: 0 <= x < 1)
        threshold = check_limit("warmup_threshold", self.warmup_threshold)
        steps = check_count("warmup_steps", self.warmup_steps, 0)
        set_fields(self, ratio=ratio, beta=beta)
        set_fields(self, warmup_steps=steps, warmup_threshold=threshold)

    def init(self, rows: int, xp: XP = np) -> Average:
        """Return the state before the first norm."""
        zeros = xp.zeros((rows,), dtype=xp.float32)
        return Average(zeros, xp.zeros((rows,), dtype=xp.int32))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return ratio * gamma, or `warmup_threshold` during the warm-up."""
        level = xp.where(state.count > 0, self.ratio * state.mean, float("inf"))
        is_warming = state.count < self.warmup_steps
        threshold = xp.where(is_warming, self.warmup_threshold, level)
        return Limit(threshold, threshold)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Average:
        """Return the average that includes the norm after clipping."""
        mean, count = state
        applied = xp.minimum(norms, limit.target)
        is_warming = count < self.warmup_steps
        average = mean + (1 - self.beta) * (applied - mean)
        if keeps_only_last(self.beta):
            average = applied
        next_mean = xp.where(is_warming, xp.minimum(mean, applied), average)
        next_count = xp.where(is_warming | (count == 0), count + 1, count)
        return Average(xp.where(count == 0, applied, next_mean), next_count)
