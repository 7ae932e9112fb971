"""Notice gradients of single examples: each has an axis that its parameter lacks."""

import sys
import warnings
from typing import Any

import jax

from .rows import is_gradient, is_none

_PACKAGES = {"autoclip_jax", "flax", "jax", "optax"}

_TEXT = (
    "each gradient has an axis of size {} in front that its parameter lacks, as the "
    "gradients of single examples have, so the clipper takes one norm of all examples; "
    "clip their mean: jax.tree.map(lambda g: g.mean(axis=0), grads), or clip each to a "
    "fixed norm: optax.per_example_global_norm_clip(jax.tree.leaves(grads), 1.0)"
)


def warn_if_not_averaged(updates: Any, params: Any) -> None:
    """Warn if each gradient has one axis more than its parameter, in front.

    So have the gradients of single examples. Their joint norm would be clipped: a large
    one would shrink all others. Only shapes are compared, when the step is traced.

    Args:
      updates: the gradients.
      params: the parameters, or None.
    """
    if params is None:
        return
    leaves = jax.tree.leaves(updates, is_leaf=is_none)
    weights = jax.tree.leaves(params, is_leaf=is_none)
    if len(leaves) != len(weights):
        return
    shapes = [
        (tuple(leaf.shape), tuple(getattr(weight, "shape", ())))
        for leaf, weight in zip(leaves, weights, strict=True)
        if is_gradient(leaf)
    ]
    sizes = {s[0] if s and s[1:] == weight_shape else 1 for s, weight_shape in shapes}
    if len(sizes) == 1 and sizes != {1}:
        _warn(_TEXT.format(*sizes))


def _warn(text: str) -> None:
    """Warn at the nearest caller that is in none of the packages, once per line."""
    frame = sys._getframe(1)
    while _get_package(frame.f_globals) in _PACKAGES and frame.f_back is not None:
        frame = frame.f_back
    warnings.warn_explicit(
        text,
        RuntimeWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _get_package(module: dict[str, Any]) -> str:
    return str(module.get("__name__", "")).partition(".")[0]
