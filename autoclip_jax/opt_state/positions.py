"""Where clippers stand in an optimizer state: what they clip, and what undoes that."""

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

from autoclip_jax.skip_state import SkipState
from autoclip_jax.state import ClipState, TrustState

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


class Place(NamedTuple):
    """A clipper in an optimizer state."""

    state: ClipState | SkipState
    """Its state."""
    is_update: bool
    """Whether it clips the update."""
    clippers_before: int
    """The number of clippers before it in its chain. A mask may part their leaves."""


def find_clippers(
    part: Any, is_behind: bool = False, is_followed: bool = False, before: int = 0
) -> Iterator[Place]:
    """Yield each clipper of an optimizer state.

    A clipper clips the update if another transformation of its chain stands before it,
    and none behind it. Other clippers do not count. In a wrapper, the position is that
    of the wrapper.

    Args:
      part: an optimizer state, or a part of it.
      is_behind: whether another transformation stands before this part.
      is_followed: whether another transformation stands behind this part.
      before: the number of clippers before this part.
    """
    if isinstance(part, ClipState):
        yield Place(part, is_behind and not is_followed, before)
    elif isinstance(part, SkipState):
        yield Place(part, False, before)  # its clipper decides on the gradient
        yield from find_clippers(part.skip_inner_state, is_behind, is_followed, before)
    elif isinstance(part, TrustState):
        yield from find_clippers(part.trust_gradient, before=before)
        yield from find_clippers(part.trust_inner_state, is_behind, is_followed, before)
        yield from find_clippers(part.trust_update, is_behind=True)
    elif _has_clipper(part):
        links = _list_children(part)
        changes = [_is_chain(part) and _has_transformation(link) for link in links]
        for index, link in enumerate(links):
            behind = is_behind or any(changes[:index])
            followed = is_followed or any(changes[index + 1 :])
            yield from find_clippers(link, behind, followed, before)
            if _is_chain(part):
                before += sum(isinstance(p, ClipState) for p in _list_leaves(link))


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
    for index, link in enumerate(_list_children(part)) if _has_clipper(part) else ():
        before = _list_children(part)[:index] if _is_chain(part) else []
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


def warn_if_micro_batches_are_clipped(opt_state: Any) -> None:
    """Warn if a clipper acts before an accumulator of optax in a chain.

    Only the structure of the state is read, so it works inside `jit`. The state does
    not show the number of micro-batches. `skip_steps` may leave out a micro-batch on
    purpose, and a clipper before the accumulator may if another one clips the mean.
    """
    if _has_clipper_before(opt_state):
        warnings.warn(
            "a clipper acts before optax.MultiSteps or optax.apply_every, so it clips "
            "each micro-batch and not their mean; put it inside of MultiSteps: "
            "optax.MultiSteps(optax.chain(clip, optimizer), k), or "
            "optax.MultiSteps(trust_clip(optimizer), k). To clip each micro-batch on "
            "purpose, keep the clipper and its state out of the chain: "
            "grads, clip_state = clip.update(grads, clip_state, params)",
            RuntimeWarning,
            stacklevel=3,
        )


def _find_other_weights(state: Any) -> str:
    """Return the name of a state whose optimizer would undo a bound, or ""."""

    def is_found(part: Any) -> bool:
        return type(part).__name__ in _WAYS_OUT_OF_OPTIMIZERS

    parts = jax.tree.leaves(state, is_leaf=is_found)
    return next((type(part).__name__ for part in parts if is_found(part)), "")


def _has_transformation(part: Any) -> bool:
    """Return whether a link of a chain holds a transformation that is no clipper."""
    if isinstance(part, ClipState):
        return False
    if isinstance(part, SkipState):
        return _has_transformation(part.skip_inner_state)
    if isinstance(part, TrustState) or not _has_clipper(part):
        return True
    links = _list_children(part)
    # The other fields of a wrapper are its counts.
    return any(
        _has_transformation(link)
        for link in links
        if _is_chain(part) or _has_clipper(link)
    )


def _is_chain(part: Any) -> bool:
    """Return whether a part is the state of `optax.chain` or `optax.named_chain`."""
    return type(part) in (tuple, OrderedDict)


def _list_children(part: Any) -> list[Any]:
    """Return the parts of a pytree, one level down."""
    children: list[Any] = jax.tree.leaves(part, is_leaf=lambda x: x is not part)
    return children


def _has_clipper(part: Any) -> bool:
    leaves = jax.tree.leaves(part, is_leaf=_is_clipper)
    return any(_is_clipper(leaf) for leaf in leaves)


def _is_clipper(part: Any) -> bool:
    return isinstance(part, ClipState | SkipState)


def _has_clipper_before(part: Any) -> bool:
    """Return whether a chain in a state has an accumulator behind a clipper.

    A mask around a clipper is not in its state. So a clipper in a mask counts only if
    the accumulator has all leaves.
    """
    if not _list_accumulators(part):  # nothing to find, such as in an array
        return False
    children = _list_children(part)
    links = children if _is_chain(part) or isinstance(part, TrustState) else []
    is_behind = has_clipper = has_all_leaves = False
    for index, link in enumerate(links):
        is_sum = isinstance(link, optax.ApplyEvery)
        accumulators = _list_accumulators(link) if is_behind and not is_sum else []
        for each in accumulators:
            may_share = has_all_leaves or not _is_masked(each)
            if may_share and not _has_gradient_clipper(each):
                return True
        # Unlike MultiSteps, it sums what the optimizer before it returns.
        if is_sum and has_clipper:
            return not any(map(_has_gradient_clipper, links[index:]))
        has_clipper = has_clipper or _has_gradient_clipper(link)
        # Behind an optimizer, updates are accumulated, or another state begins.
        is_before = not _has_moments(link)
        is_behind = is_before and (is_behind or _has_gradient_clipper(link))
        has_all_leaves = is_before and (has_all_leaves or _has_unmasked_clipper(link))
    return any(map(_has_clipper_before, children))


def _list_accumulators(part: Any) -> list[Any]:
    """Return the outermost states of accumulators in a part of a state."""
    leaves = jax.tree.leaves(part, is_leaf=_is_accumulator)
    return [leaf for leaf in leaves if _is_accumulator(leaf)]


def _is_accumulator(part: Any) -> bool:
    return isinstance(part, optax.MultiStepsState | optax.ApplyEvery)


def _is_masked(accumulator: Any) -> bool:
    """Return whether a mask leaves out some leaves of an accumulator."""
    is_sum = isinstance(accumulator, optax.ApplyEvery)
    total = accumulator.grad_acc if is_sum else accumulator.acc_grads

    def is_left_out(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    return any(map(is_left_out, jax.tree.leaves(total, is_leaf=is_left_out)))


def _has_unmasked_clipper(part: Any) -> bool:
    kinds = ClipState | SkipState | optax.MaskedState
    leaves = jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, kinds))
    return any(isinstance(leaf, ClipState) for leaf in leaves)


def _has_gradient_clipper(part: Any) -> bool:
    return any(isinstance(leaf, ClipState) for leaf in _list_leaves(part))


def _has_moments(part: Any) -> bool:
    """Return whether a link holds arrays that are no numbers, as optimizers do."""
    return any(getattr(leaf, "ndim", 0) > 0 for leaf in _list_leaves(part))


def _list_leaves(part: Any) -> list[Any]:
    """Return the leaves of a part of a state, with clippers as leaves."""
    leaves: list[Any] = jax.tree.leaves(
        part, is_leaf=lambda x: isinstance(x, ClipState | SkipState)
    )
    return leaves
