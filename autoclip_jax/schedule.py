"""A threshold that follows an optax schedule."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from autoclip_core import Limit, Policy
from autoclip_core.checks import format_error
from autoclip_core.scale import XP, Array


class ScheduleState(NamedTuple):
    """The state of `OptaxSchedule`."""

    count: Array
    """Shape (rows,): the norms recorded so far."""


@dataclass(frozen=True, repr=False)
class OptaxSchedule(Policy):
    """Clip to a threshold that follows an optax schedule: T = R = schedule(k).

    k is the number of norms that the row has recorded. Each row has its own count. A
    step does not count for a row if its gradient is zero or not finite. The count is
    the state, so a resumed run continues the schedule.

    Use it as any policy: in `clip_by_policy`, in `skip_steps`, or inside `Cap`, `Drop`
    and the other combinators. `autoclip_core.Scheduled` is the policy for all
    frameworks.

    Args:
      schedule: a function of a step count, such as `optax.cosine_decay_schedule(...)`.
        It returns the threshold, > 0, in the unit of a gradient norm. With a threshold
        of 0 the gradient is removed.

    Raises:
      TypeError: `schedule` is not a function.

    >>> schedule = optax.linear_schedule(4.0, 1.0, transition_steps=3)
    >>> from autoclip_jax import clip_by_policy
    >>> tx = clip_by_policy(OptaxSchedule(schedule), scope="global")
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.array([8.0]), state)
    ...     print(updates[0])
    4.0
    3.0
    2.0
    """

    schedule: optax.Schedule

    def __post_init__(self) -> None:
        """Check that the schedule can be called."""
        if not callable(self.schedule):
            rule, way_out = "an optax schedule", "for a constant, use Fixed(max_norm)"
            error = format_error("schedule", rule, self.schedule, way_out)
            raise TypeError(error)

    def init(self, rows: int, xp: XP = jnp) -> ScheduleState:
        """Return a count of 0."""
        return ScheduleState(xp.zeros((rows,), dtype=xp.int32))

    def limit(
        self,
        state: Any,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: XP = jnp,
    ) -> Limit:
        """Return the value of the schedule at the present count of each row."""

        def compute(count: Array) -> Array:
            return jnp.asarray(self.schedule(count), jnp.float32)

        threshold = xp.asarray(jax.vmap(compute)(state.count))
        return Limit(threshold, threshold)

    def record(
        self, state: Any, norms: Array, limit: Limit, xp: XP = jnp
    ) -> ScheduleState:
        """Return the next count."""
        return ScheduleState(state.count + 1)
