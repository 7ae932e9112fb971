"""Give the state of an earlier version the present structure."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from autoclip_core.loss import LossState
from autoclip_jax.skip_state import SkipLoss
from autoclip_jax.state import (
    ClipState,
    add_prefix,
    bound,
    is_earlier_state,
    rename_fields,
)


def upgrade_state(old: Any) -> Any:
    """Return an optimizer state of an earlier version in the present structure.

    Earlier versions named some fields as optax does (`count`, `mean`, `inner_state`).
    They did not count the steps with a dropped row, had only the norm "l2", and had no
    loss policy. The fields get their present names, the missing count starts at 0, and
    `clip_totals` and `skip_loss` are None. All else is unchanged.

    Args:
      old: the restored optimizer state: the objects themselves, from a pickle, or the
        nested dicts to which a format of names restores them.

    >>> import jax.numpy as jnp
    >>> from autoclip_core import StreamingQuantile
    >>> from autoclip_core.clipper.metrics import empty_tally
    >>> from autoclip_jax import clip_by_policy
    >>> policy = StreamingQuantile()
    >>> state = clip_by_policy(policy).init(jnp.zeros(2))
    >>> old = state._replace(clip_policy=policy.init(1), clip_tally=empty_tally(1))
    >>> upgrade_state(old).clip_policy._fields
    ('policy_level',)
    """
    return jax.tree.map(_upgrade, old, is_leaf=_is_earlier)


_PREFIXES = {
    "clip_policy": "policy_",
    "clip_tally": "tally_",
    "clip_totals": "totals_",
    "skip_loss_state": "loss_",
}
"""The fields that hold a state of the core, and the prefix of its names."""


def _is_earlier(part: Any) -> bool:
    """Return whether a part of a state may need new names; a dict may have either."""
    if isinstance(part, Mapping):
        markers = {*_PREFIXES, "skip_clip", "trust_gradient"}
        return not markers.isdisjoint(part)
    if isinstance(part, ClipState):
        return is_earlier_state(part)
    return isinstance(part, SkipLoss) and isinstance(part.skip_loss_state, LossState)


def _upgrade(part: Any) -> Any:
    if not _is_earlier(part):
        return part
    if isinstance(part, Mapping):
        return _upgrade_dict(part)
    fields = part._asdict()
    if isinstance(part, ClipState) and part.clip_tally.dropped is None:
        dropped = jnp.zeros_like(part.clip_tally.steps)
        fields["clip_tally"] = part.clip_tally._replace(dropped=dropped)
    for name in _PREFIXES.keys() & fields.keys():
        fields[name] = rename_fields(bound(fields[name]), _PREFIXES[name])
    return type(part)(**fields)


def _upgrade_dict(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a state under their present names, and the later fields."""
    new: dict[str, Any] = {}
    for name, value in old.items():
        if name in _PREFIXES:
            new[name] = _rename_keys(bound(value), _PREFIXES[name])
            continue
        if name == "inner_state":
            name = "skip_inner_state" if "skip_clip" in old else "trust_inner_state"
        new[name] = upgrade_state(value)
    if "clip_policy" in new:
        new.setdefault("clip_totals", None)
    if "skip_clip" in new:
        new.setdefault("skip_loss", None)
    if "clip_tally" in new:
        tally = new["clip_tally"]
        tally.setdefault("tally_dropped", jnp.zeros_like(tally["tally_steps"]))
    return new


def _rename_keys(part: Any, prefix: str) -> Any:
    """Return a state of the core, as nested dicts, with a prefix before each name."""
    if not isinstance(part, Mapping):
        return part
    return {add_prefix(n, prefix): _rename_keys(v, prefix) for n, v in part.items()}
