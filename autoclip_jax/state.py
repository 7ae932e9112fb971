"""The state of a clipper in JAX, and whether a state fits an update."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from autoclip_core import Policy
from autoclip_core.clipper import metrics
from autoclip_core.clipper.metrics import Tally, Totals

from .rows import Rows


class ClipState(NamedTuple):
    """The state of a transformation that clips; a row's fields have shape (rows,)."""

    clip_policy: Any
    """The policy state."""
    clip_norm: Array
    """The last norm of each row, before scaling: 0 at first, NaN without gradient."""
    clip_threshold: Array
    """The threshold of each row; +inf if there was none."""
    clip_scale: Array
    """The scale of each row; with `scale_only`, the norm after / the norm before."""
    clip_clipped: Array
    """Whether each row was clipped."""
    clip_finite: Array
    """Whether the norm of each row was finite."""
    clip_tally: Tally
    """The counts of the run, for `clip_metrics`."""
    clip_totals: Totals | None = None
    """The norm of all rows as one row; None if `norm` is "l2": the rows say it."""


class TrustState(NamedTuple):
    """The state of `trust_clip`."""

    trust_gradient: Any
    """The `ClipState` of the gradient filter; with `exclude`, inside a mask."""
    inner_state: Any
    """The state of the wrapped optimizer."""
    trust_update: Any
    """The `ClipState` of the bound; with `exclude`, inside a mask."""


def init_state(policy: Policy, rows: int, norm: str) -> ClipState:
    """Return the state before the first step; every array has its own buffer."""
    return ClipState(
        clip_policy=policy.init(rows, jnp),
        clip_norm=jnp.zeros((rows,), jnp.float32),
        clip_threshold=jnp.full((rows,), jnp.inf, jnp.float32),
        clip_scale=jnp.ones((rows,), jnp.float32),
        clip_clipped=jnp.zeros((rows,), bool),
        clip_finite=jnp.ones((rows,), bool),
        clip_tally=metrics.empty_tally(rows, jnp),
        clip_totals=None if norm == "l2" else _no_totals(),
    )


def _no_totals() -> Totals:
    return Totals(*(jnp.zeros((), jnp.float32) for _ in Totals._fields))


def check_state_matches(
    policy: Policy, state: ClipState, rows: Rows, norm: str
) -> None:
    """Refuse a state of other parameters or of another policy; costs only tracing.

    Raises:
      TypeError: the state belongs to another transformation.
      ValueError: rows, the policy's kind, a shape or a type differ; the message says
        which.
    """
    if not isinstance(state, ClipState):
        raise wrong_state_error(state, "ClipState of a clipper")
    shape, row_count = tuple(state.clip_norm.shape), len(rows.names)
    if shape != (row_count,):
        raise ValueError(
            f"the state of a clipper must fit the updates: it has {sum(shape[-1:])} "
            f"rows, and the updates make {row_count}; init it on parameters of this "
            "structure, and give params to update if gradients may be None"
        )
    actual = array_types(state)
    expected = array_types(jax.eval_shape(partial(init_state, policy, row_count, norm)))
    if actual != expected:
        names = sorted(actual.keys() ^ expected.keys()) or [
            name for name in expected if actual[name] != expected[name]
        ]
        pair = [{n: t.get(n, "absent") for n in names} for t in (actual, expected)]
        raise ValueError(
            f"the state of a clipper must fit its policy: it holds {pair[0]}, and "
            f"{policy!r} makes {pair[1]}; restore it into the policy that saved it"
            f"{upgrade_hint(state)}"
        )


def upgrade_hint(state: ClipState) -> str:
    """Return how to convert a state that an earlier version saved; else ""."""
    is_earlier = state.clip_tally.dropped is None
    return ", and convert it: upgrade_state(opt_state)" if is_earlier else ""


def wrong_state_error(state: Any, expected: str) -> TypeError:
    """Return the error for the state of another transformation."""
    return TypeError(
        f"state must be the {expected}, got {type(state).__name__}; was skip_steps, "
        "trust_clip or a link of the chain added or removed since the state was saved?"
    )


def array_types(state: Any) -> dict[str, str]:
    """Return the shape and the type of each array, by path."""
    return {
        jax.tree_util.keystr(path): f"{tuple(leaf.shape)} {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
