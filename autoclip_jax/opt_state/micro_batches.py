"""Notice a clipper that clips each micro-batch and not their mean."""

import warnings
from typing import Any

import jax
import optax

from autoclip_jax.skip_state import SkipState
from autoclip_jax.state import ClipState, TrustState

from .tree import is_chain, list_children, list_leaves


def warn_if_micro_batches_are_clipped(opt_state: Any) -> None:
    """Warn if a clipper acts before an accumulator of optax in a chain.

    Only the structure of the state is read, so it works inside `jit`. The state does
    not show the number of micro-batches. `skip_steps` may leave out a micro-batch on
    purpose, and a clipper before the accumulator may if another one clips the mean.
    """
    if _has_clipper_before(opt_state):
        warnings.warn(
            "a clipper acts before optax.MultiSteps or optax.apply_every, so unless k "
            "is 1 it clips each micro-batch and not their mean; put it inside of "
            "MultiSteps, which is right for each k: "
            "optax.MultiSteps(optax.chain(clip, optimizer), k), or "
            "optax.MultiSteps(trust_clip(optimizer), k). To clip each micro-batch on "
            "purpose, keep the clipper and its state out of the chain: "
            "grads, clip_state = clip.update(grads, clip_state, params)",
            RuntimeWarning,
            stacklevel=3,
        )


def _has_clipper_before(part: Any) -> bool:
    """Return whether a chain in a state has an accumulator behind a clipper.

    A mask around a clipper is not in its state. So a clipper in a mask counts only if
    the accumulator has all leaves.
    """
    if not _list_accumulators(part):  # nothing to find, such as in an array
        return False
    children = list_children(part)
    links = children if is_chain(part) or isinstance(part, TrustState) else []
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
    return any(isinstance(leaf, ClipState) for leaf in list_leaves(part))


def _has_moments(part: Any) -> bool:
    """Return whether a link holds arrays that are no numbers, as optimizers do."""
    return any(getattr(leaf, "ndim", 0) > 0 for leaf in list_leaves(part))
