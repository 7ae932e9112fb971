"""The state of a clipper in JAX, and whether a state fits an update.

`optax.tree.get(opt_state, "count")` searches the states of all transformations by field
name. So no field may have a name that a state of optax has. The states of
`autoclip_core` keep their names: `rename_fields` puts a prefix before each.
"""

import re
from collections import namedtuple
from collections.abc import Mapping
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from autoclip_core import Policy
from autoclip_core.clipper import metrics
from autoclip_core.clipper.metrics import Tally, Totals

from .gradients.rows import Rows


class ClipState(NamedTuple):
    """The state of a transformation that clips; a row's fields have shape (rows,)."""

    clip_policy: Any
    """The policy state; its fields begin with `policy_`."""
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
    clip_tally: Any
    """The counts of the run, for `clip_metrics`; the fields begin with `tally_`."""
    clip_totals: Any = None
    """The norm of all rows as one row, `totals_norm` before scaling and
    `totals_norm_after`; None if `norm` is "l2": the rows say it."""


class TrustState(NamedTuple):
    """The state of `trust_clip`."""

    trust_gradient: Any
    """The `ClipState` of the gradient filter; with `exclude`, inside a mask."""
    trust_inner_state: Any
    """The state of the wrapped optimizer."""
    trust_update: Any
    """The `ClipState` of the bound; with `exclude`, inside a mask."""

    @property
    def inner_state(self) -> Any:
        """The earlier name of `trust_inner_state`."""
        return self.trust_inner_state


def rename_fields(state: Any, prefix: str) -> Any:
    """Return a state of the core with a prefix before each field name.

    The new tuples also have the values under the names of the core, as properties.

    >>> from autoclip_core import StreamingQuantile
    >>> state = rename_fields(StreamingQuantile().init(1), "policy_")
    >>> state._fields
    ('policy_level',)
    """
    if not isinstance(state, tuple) or hasattr(state, "core_class"):
        return state
    values = (rename_fields(value, prefix) for value in state)
    if not hasattr(state, "_fields"):
        return tuple(values)
    return _make_class(type(state), prefix)(*values)


def restore_names(state: Any) -> Any:
    """Return a state with the classes and the names of the core."""
    if not isinstance(state, tuple):
        return state
    values = map(restore_names, state)
    if not hasattr(state, "_fields"):
        return tuple(values)
    return getattr(state, "core_class", type(state))(*values)


_LARGEST = float(np.finfo(np.float32).max)


def bound(state: Any) -> Any:
    """Return a policy state with the largest float32 in place of infinity.

    `optax.contrib.sam` selects a state by arithmetic, `c * new + (1 - c) * old`, and
    0 * inf is NaN.
    """

    def bound_leaf(leaf: Any) -> Any:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.clip(leaf, -_LARGEST, _LARGEST) if is_float else leaf

    return jax.tree.map(bound_leaf, state)


def unbound(state: Any) -> Any:
    """Return a policy state with its infinities; see `bound`."""

    def unbound_leaf(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        infinity = jnp.asarray(jnp.inf, leaf.dtype)
        leaf = jnp.where(leaf >= _LARGEST, infinity, leaf)
        return jnp.where(leaf <= -_LARGEST, -infinity, leaf)

    return jax.tree.map(unbound_leaf, state)


def add_prefix(name: str, prefix: str) -> str:
    """Return the name of a field after `rename_fields`."""
    return name if name.startswith(prefix) else prefix + name


@cache
def _make_class(core_class: Any, prefix: str) -> Any:
    """Return the class of a renamed state; one per process, as pytrees need it."""

    def reduce(state: Any) -> tuple[Any, ...]:
        return _make_state, (core_class, prefix, tuple(state))

    names = [add_prefix(name, prefix) for name in core_class._fields]
    make_base: Any = namedtuple  # mypy accepts only literal names
    members: dict[str, Any] = {
        name: property(itemgetter(index))
        for index, name in enumerate(core_class._fields)
        if name not in names
    }
    members |= {"core_class": core_class, "__reduce__": reduce, "__slots__": ()}
    name = core_class.__name__
    return type(name, (make_base(name, names),), members)


def _make_state(core_class: Any, prefix: str, values: tuple[Any, ...]) -> Any:
    """Return a renamed state; a pickle calls this function."""
    return _make_class(core_class, prefix)(*values)


def init_state(policy: Policy, rows: int, norm: str) -> ClipState:
    """Return the state before the first step; every array has its own buffer."""
    return ClipState(
        clip_policy=rename_fields(bound(policy.init(rows, jnp)), "policy_"),
        clip_norm=jnp.zeros((rows,), jnp.float32),
        clip_threshold=jnp.full((rows,), jnp.inf, jnp.float32),
        clip_scale=jnp.ones((rows,), jnp.float32),
        clip_clipped=jnp.zeros((rows,), bool),
        clip_finite=jnp.ones((rows,), bool),
        clip_tally=rename_fields(metrics.empty_tally(rows, jnp), "tally_"),
        clip_totals=None if norm == "l2" else _no_totals(),
    )


def _no_totals() -> Any:
    totals = Totals(*(jnp.zeros((), jnp.float32) for _ in Totals._fields))
    return rename_fields(totals, "totals_")


def check_state_matches(policy: Policy, state: ClipState, rows: Rows) -> None:
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
    init = partial(init_state, policy, row_count, rows.norm)
    expected = array_types(jax.eval_shape(init))
    # The arithmetic of `optax.contrib.sam` makes integers of booleans, int64 with x64.
    actual = {
        name: re.sub(r"int(32|64)$", "bool", kind)
        if "bool" in expected.get(name, "")
        else kind
        for name, kind in array_types(state).items()
    }
    if actual != expected:
        names = sorted(actual.keys() ^ expected.keys()) or [
            name for name in expected if actual[name] != expected[name]
        ]
        pair = [{n: t.get(n, "absent") for n in names} for t in (actual, expected)]
        raise ValueError(
            f"the state of a clipper must fit its policy: it holds {pair[0]}, and "
            f"{policy!r} makes {pair[1]}; restore it into the policy that saved it"
            f"{', and convert it: upgrade_state(opt_state)' * is_earlier_state(state)}"
        )


def is_earlier_state(state: ClipState) -> bool:
    """Return whether an earlier version saved a state: its names are the core's."""
    return isinstance(state.clip_tally, Tally)


def wrong_state_error(state: Any, expected: str) -> TypeError:
    """Return the error for the state of another transformation."""
    way_out = (
        "was skip_steps, trust_clip or a link of the chain added or removed since the "
        "state was saved?"
    )
    if state is None:
        way_out = "pass that of init(params), then the one that each update returns"
    elif isinstance(state, Mapping):
        way_out = "restore the checkpoint into the structure of init(params)"
    kind = type(state).__name__
    return TypeError(f"state must be the {expected}, got {kind}; {way_out}")


def array_types(state: Any) -> dict[str, str]:
    """Return the shape and the type of each array, by path."""
    return {
        jax.tree_util.keystr(path): f"{tuple(leaf.shape)} {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
