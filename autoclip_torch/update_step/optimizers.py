"""Which optimizers an `UpdateClipper` accepts, and the innermost of several.

An update can be clipped if the optimizer computes the next weights from the present
ones. The optimizers below compute them from weights of their own, or move the weights
outside of one step, so they would undo the clipping.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_torch.gradients.dtensor import get_local
from autoclip_torch.hooks.clipped_optimizer import ClippedOptimizer
from autoclip_torch.step.unwrap import get_inner, unwrap

from .changes import Change

_CLASSES = {
    "LBFGS": "takes several steps in one call, and keeps a history of them",
    "ASGD|SWA": "averages weights that are not clipped yet",
    ".*ScheduleFree.*": "interpolates between weights of its own",
    ".*Lookahead|Ranger.*|EmoNavi": "pulls the weights to slow weights of its own",
    ".*SAM": "moves the weights twice in each step",
    "LOMO|AdaLOMO": "steps within the backward pass",
    "ZeroRedundancyOptimizer|DistributedOptimizer|.*Zero.*Optimizer.*": (
        "steps a part of the weights, and receives the rest from other ranks"
    ),
    ".*(FP|Float|float|BF)16.*|MixedPrecision.*": "steps float32 copies of the weights",
    "FTRL|MADGRAD|DAdaptSGD|DAdaptAdaGrad|AccSGD|A2Grad|SPlus|TRAC": (
        "computes the weights from sums or weights in its state"
    ),
}
"""Patterns of class names, also of base classes, and what such an optimizer does."""

_ATTRIBUTES = (
    "fp32_params",
    "fp32_from_fp16_groups",
    "fp32_from_float16_groups",
    "shard_fp32_from_float16_groups",
    "single_partition_of_fp32_groups",
    "master_weights",
)
"""Attributes that are set on optimizers with float32 copies of the weights."""


def find_innermost(optimizer: Any) -> Optimizer:
    """Return the optimizer that steps, inside wrappers and `ClippedOptimizer`s.

    Raises:
      TypeError: the argument neither is nor holds a torch optimizer.
      ValueError: the optimizer or a wrapper would undo the clipping.
    """
    inner = unwrap(optimizer)
    _check_layers(optimizer, inner)
    if isinstance(inner, ClippedOptimizer):
        return find_innermost(inner.optimizer)
    return inner


def _check_layers(layer: Any, inner: Optimizer) -> None:
    """Check an optimizer inside wrappers, and each of these."""
    while layer is not inner:
        _check_accepted(layer)
        layer = get_inner(layer)
    _check_accepted(inner)


def _check_accepted(optimizer: Any) -> None:
    names = [base.__name__ for base in type(optimizer).__mro__]
    reasons = [
        reason
        for pattern, reason in _CLASSES.items()
        if any(re.fullmatch(pattern, name) for name in names)
    ]
    if any(getattr(optimizer, name, False) for name in _ATTRIBUTES):
        reasons.append("steps float32 copies of the weights")
    if reasons:
        rule = "one that computes its next weights from the present ones"
        got = f"{names[0]}, which {reasons[0]}"
        way_out = "clip its gradients instead: Clipper(model, policy).attach(optimizer)"
        raise ValueError(f"optimizer must be {rule}, got {got}; {way_out}")


class Suspect(NamedTuple):
    """An entry of the state that may equal the weights after the first step."""

    is_copy: Tensor
    """Whether it equals the weights of every parameter, a boolean that is not read."""
    entry: Tensor
    """That of the smallest parameter."""
    first: Tensor
    """A copy of this entry after the first step."""

    def has_moved(self) -> bool:
        """Return whether the optimizer has changed it since.

        Initial weights, such as those of Prodigy, never change.
        """
        return not torch.equal(get_local(self.entry), self.first)


def find_weights_in_state(
    optimizer: Optimizer, changes: Iterable[Change]
) -> dict[str, Suspect]:
    """Return the entries of the state that may be weights of the optimizer.

    Slow weights and master copies equal the weights before or after the first step, for
    every parameter. Zeros and the gradients are no weights.
    """
    wide = [change for change in changes if change.entry.parameter.numel() > 1]
    dense = [change for change in wide if not change.old.is_sparse]
    if not dense:
        return {}
    flags = [
        {k: _is_copy(v, each) for k, v in state.items() if _fits(v, each.old)}
        for each in dense
        for state in [optimizer.state.get(each.entry.parameter, {})]
    ]
    smallest = min(dense, key=lambda each: each.old.numel()).entry.parameter
    suspects = {}
    for name in set(flags[0]).intersection(*flags):
        entry = optimizer.state[smallest][name]
        of_each = [flag[name].to(entry.device) for flag in flags]
        is_copy = torch.stack(of_each).all()
        suspects[name] = Suspect(is_copy, entry, get_local(entry).clone())
    return suspects


def _fits(value: Any, weights: Tensor) -> bool:
    is_dense = isinstance(value, Tensor) and not value.is_sparse
    return is_dense and value.shape == weights.shape


def _is_copy(value: Tensor, change: Change) -> Tensor:
    """Return whether a tensor equals the weights before or after a step."""
    local, old, new = map(get_local, (value, change.old, change.new))
    local = local.to(old.device, old.dtype)
    is_copy = ((local == old).all() | (local == new).all()) & (local != 0).any()
    gradient = change.entry.parameter.grad
    if gradient is None or gradient.is_sparse:
        return is_copy
    return is_copy & (local != get_local(gradient)).any()
