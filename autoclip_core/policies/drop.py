"""`Drop`: remove a gradient above a drop level, and clip below it."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from autoclip_core.checks import check_choice
from autoclip_core.policy import Policy, check_policy
from autoclip_core.scale import XP, Array, Limit, complete_limit, find_level

from .combinators import Combinator


class DropAndClip(NamedTuple):
    """The state of a `Drop` that has a policy to clip by."""

    policy: Any
    """The state of the policy that sets the drop level."""
    clip: Any
    """The state of the policy that clips."""


@dataclass(frozen=True, repr=False)
class Drop(Combinator):
    """Remove a gradient whose norm exceeds the threshold of a policy: D = T, R = 0.

    Below the drop level D the gradient is unchanged, or clipped by the policy `clip`.
    Both policies record all norms, each against its own limit, also those of removed
    gradients. So the drop level can follow a lasting change of level.

    Args:
      policy: the policy whose threshold is the drop level.
      action: "zero" sets the gradient of the row to 0. "skip" cancels the whole update
        if any row exceeds its drop level.
      clip: the policy that clips up to the drop level; None clips nothing.

    Raises:
      TypeError: `policy` or `clip` is not a policy.
      ValueError: `action` is neither "zero" nor "skip".

    >>> from autoclip_core import Fixed, decide
    >>> policy = Drop(Fixed(1.0), action="skip")
    >>> _, decision = decide(policy, policy.init(rows=2), [0.5, 4.0])
    >>> decision.scale.tolist(), decision.skipped.tolist()
    ([0.0, 0.0], [True, True])
    >>> policy = Drop(Fixed(10.0), clip=Fixed(1.0))
    >>> _, decision = decide(policy, policy.init(rows=3), [0.5, 4.0, 40.0])
    >>> decision.scale.tolist(), decision.dropped.tolist()
    ([1.0, 0.25, 0.0], [False, False, True])

    Reference:
      Chen, Firat, Bapna et al., "The best of both worlds: Combining recent advances in
      neural machine translation", 2018, https://arxiv.org/abs/1804.09849
    """

    _: KW_ONLY
    action: str = "zero"
    clip: Policy | None = field(default=None, metadata={"is_added": True})

    def __post_init__(self) -> None:
        """Check the arguments."""
        super().__post_init__()
        check_choice("action", self.action, ("zero", "skip"))
        if self.clip is not None:
            check_policy(self.clip, "clip")

    @property
    def expected_clip_rate(self) -> float | None:
        """The rate of the inner policy, which `Drop` removes; None with `clip`."""
        return self.policy.expected_clip_rate if self.clip is None else None

    @property
    def needs_param_norms(self) -> bool:
        """Whether one of the policies needs the norms of the parameters."""
        return any(policy.needs_param_norms for policy in self._policies)

    @property
    def can_limit_losses(self) -> bool:
        """Whether all policies work on values of any sign."""
        return all(policy.can_limit_losses for policy in self._policies)

    @property
    def _policies(self) -> list[Policy]:
        return [self.policy] if self.clip is None else [self.policy, self.clip]

    def init(self, rows: int, xp: XP = np) -> Any:
        """Return the state of the inner policy; with `clip`, the states of both."""
        state = self.policy.init(rows, xp)
        if self.clip is None:
            return state
        return DropAndClip(state, self.clip.init(rows, xp))

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the inner threshold as the drop level, and the limit of `clip`.

        Before the norms are known, the limit is that of `clip` alone.

        Raises:
          ValueError: `norms` and `clip` are None. Drop cannot remove a gradient before
            its norm is known.
        """
        others: Any = {"param_norms": param_norms, "xp": xp}
        if norms is None:
            return self._limit_without_norms(state, others)
        if self.clip is None:
            inner = self.policy.limit(state, norms, **others)
            drop = find_level(inner, xp)
            threshold = xp.full(tuple(norms.shape), float("inf"), dtype=xp.float32)
            cancels = self.action == "skip" or inner.cancels
            return Limit(threshold, threshold, inner, cancels, drop=drop)
        inner = self.policy.limit(state.policy, norms, **others)
        clip = self.clip.limit(state.clip, norms, **others)
        drop = find_level(inner, xp)
        threshold, target, _, cancels, clip_drop = complete_limit(clip, xp)
        drop = xp.where(drop > clip_drop, clip_drop, drop)
        cancels = self.action == "skip" or inner.cancels or cancels
        return Limit(threshold, target, (inner, clip), cancels, drop=drop)

    def _limit_without_norms(self, state: Any, others: Any) -> Limit:
        """Return the limit of `clip`, or raise: nothing can be dropped yet."""
        if self.clip is None:
            raise ValueError(
                "Drop needs the current norm, but the caller asked for a threshold "
                "before the norm is known; use the policy without Drop, or "
                "Drop(policy, clip=...), whose threshold is that of clip"
            )
        return self.clip.limit(state.clip, None, **others)

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Any:
        """Return the next state of each policy, recorded against its own limit."""
        if self.clip is None:
            return super().record(state, norms, limit, xp)
        limits: Any = limit.inner
        inner, clip = limits
        return DropAndClip(
            self.policy.record(state.policy, norms, inner, xp),
            self.clip.record(state.clip, norms, clip, xp),
        )
