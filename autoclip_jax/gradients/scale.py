"""The updates times the scales of their rows."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from autoclip_core.clipper.units import ParameterRows, Units, split_shape

from .leaves import list_row_leaves, spread, widen
from .rows import Rows, is_gradient, is_none


def scale_updates(rows: Rows, tree: Any, scales: Array) -> Any:
    """Return the tree scaled leaf by leaf; a scale of 1 leaves each bit of a leaf."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    by_range = _split_scales(scales, [p for p, _ in list_row_leaves(rows, tree)])
    scaled = [
        _scale(leaf, by_range[parameter.start, parameter.stop], parameter.units)
        if is_gradient(leaf) and parameter.start < parameter.stop
        else leaf
        for parameter, leaf in zip(rows.parameters, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, scaled)


def _split_scales(
    scales: Array, parameters: Iterable[ParameterRows]
) -> dict[tuple[int, int], Array]:
    """Return the scales of each range of rows; a single one has the shape ().

    On a CPU, XLA compiles equal loops once. A slice would make its start a constant of
    the loop. The indices of a gather are an argument of the loop.
    """
    count, by_range = scales.shape[0], {}
    is_gathered = jax.default_backend() == "cpu" and count > 1
    padded = jnp.concatenate([scales, jnp.zeros((1,), scales.dtype)])
    for start, stop in {(p.start, p.stop): None for p in parameters}:
        if is_gathered:
            # XLA replaces a gather of one index or of consecutive ones by a slice.
            indices = np.array([*range(start, stop), count], np.int32)[:, None]
            gathered = _gather(padded, indices)
            part = lax.slice_in_dim(gathered, 0, stop - start)
        else:
            part = lax.slice_in_dim(scales, start, stop)
        by_range[start, stop] = part.reshape(()) if stop - start == 1 else part
    return by_range


def _gather(values: Array, indices: np.ndarray[Any, Any]) -> Array:
    """Return the values at indices of shape (n, 1), which are in bounds."""
    numbers = lax.GatherDimensionNumbers((), (0,), (0,))
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(values, indices, numbers, slice_sizes=(1,), mode=mode)


@partial(jax.jit, static_argnames="units")
def _scale(leaf: Array, scales: Array, units: Units | None) -> Array:
    """Return scale * leaf in float32 or wider; scales of 0 and 1 do not multiply."""
    view = leaf if units is None else leaf.reshape(split_shape(leaf.shape, units))
    scale = spread(scales, view, units)
    wide = widen(view, None)
    product = wide * scale.astype(wide.dtype)
    product = lax.select(scale == 0, jnp.zeros_like(wide), product)
    selected = lax.select(scale == 1, view, product.astype(leaf.dtype))
    return selected.reshape(leaf.shape)
