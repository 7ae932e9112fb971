"""Optimizers that would undo the bound of an update."""

import warnings
from typing import Any

import jax

from autoclip_jax.state import ClipState

from .positions import find_clippers
from .tree import has_clipper, is_chain, list_children

_INSIDE = "put trust_clip inside: optax."
_FILTER = (
    "clip its gradients instead: optax.chain(clip_by_quantile(0.9, scope='global'), "
    "optimizer)"
)
_WAYS_OUT_OF_OPTIMIZERS = {
    "ScheduleFreeState": (
        f"{_INSIDE}contrib.schedule_free(trust_clip(optax.sgd(0.1)), 0.1)"
    ),
    "LookaheadState": f"{_INSIDE}lookahead(trust_clip(optax.sgd(0.1)), 5, 0.5)",
    "SAMState": f"{_INSIDE}contrib.sam(trust_clip(optax.sgd(0.1)), adv_optimizer)",
    "COCOBState": _FILTER,
    "MadgradState": _FILTER,
}
"""Optimizers that would undo a bound, by the class of their state."""


def check_uses_present_weights(state: Any) -> None:
    """Refuse the state of an optimizer whose weights do not follow from the present.

    Its next weights come from others: weights or sums in its state, or slow weights. So
    the optimizer would undo the bound of an update.

    Args:
      state: what `init` of the optimizer returned.

    Raises:
      ValueError: the state, or a part of it, is that of such an optimizer.
    """
    name = _find_other_weights(state)
    if name:
        raise ValueError(
            "optimizer must compute its next weights from the present ones, got "
            f"one with the state {name}; {_WAYS_OUT_OF_OPTIMIZERS[name]}"
        )


def warn_if_undone(part: Any) -> None:
    """Warn if an optimizer before an update clipper in a chain undoes its bound.

    A transformation of a chain does not receive the states of the others, so only the
    whole state shows it.
    """
    links = list_children(part) if has_clipper(part) else []
    for index, link in enumerate(links):
        before = links[:index] if is_chain(part) else []
        name = _find_other_weights(before)
        if name and any(place.is_update for place in find_clippers(link, True)):
            warnings.warn(
                f"a clipper of the update stands behind an optimizer with the state "
                f"{name}, which computes its next weights from weights or sums of its "
                "own and so undoes the bound; clip inside of it, as in "
                "optax.contrib.schedule_free(optax.chain(optimizer, clipper), 0.1), or "
                "clip its gradients: optax.chain(clipper, optimizer)",
                RuntimeWarning,
                stacklevel=3,
            )
        if not isinstance(link, ClipState):
            warn_if_undone(link)


def _find_other_weights(state: Any) -> str:
    """Return the name of a state whose optimizer would undo a bound, or ""."""

    def is_found(part: Any) -> bool:
        return type(part).__name__ in _WAYS_OUT_OF_OPTIMIZERS

    parts = jax.tree.leaves(state, is_leaf=is_found)
    return next((type(part).__name__ for part in parts if is_found(part)), "")
