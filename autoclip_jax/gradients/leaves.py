"""The leaves of a tree that have a norm: their rows, sizes and elements."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from autoclip_core.clipper.units import (
    ParameterRows,
    Units,
    row_size,
    split_shape,
    unit_shape,
)

from .mesh import find_cutting_axes, shard_as
from .rows import Rows, is_gradient, is_none

RowLeaves = list[tuple[ParameterRows, Array]]
"""Leaves that have a norm, each with its rows."""


def list_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, including each `None`."""
    return jax.tree.leaves(tree, is_leaf=is_none)


def list_row_leaves(rows: Rows, tree: Any) -> RowLeaves:
    """Return the leaves that have a norm, each with its rows: at least one."""
    pairs = zip(rows.parameters, list_leaves(tree), strict=True)
    return [(p, leaf) for p, leaf in pairs if is_gradient(leaf) and p.start < p.stop]


def has_gradient(rows: Rows, tree: Any) -> Array:
    """Return for each part whether it has a gradient; tracing a step decides it."""
    observed = [False] * rows.part_count
    for p, _ in list_row_leaves(rows, tree):
        observed[p.start : p.stop] = [True] * (p.stop - p.start)
    return jnp.array(observed, bool)


def count_elements(rows: Rows, tree: Any) -> Array:
    """Return the number of elements of each part that has a gradient, as float32."""
    sizes = np.zeros((rows.part_count,), np.float32)
    for parameter, leaf in list_row_leaves(rows, tree):
        axes = find_cutting_axes(leaf, rows.axis_name)
        # A sum of ones is a plain number, known when tracing.
        pieces = lax.psum(1, axes) if axes else 1  # type: ignore[no-untyped-call]
        size = pieces * row_size(leaf.shape, parameter)
        sizes[parameter.start : parameter.stop] += size
    return jnp.asarray(sizes)


def widen(leaf: Array, units: Units | None) -> Array:
    """Return a leaf in float32 or wider; its axes are split if the units need it."""
    wide = leaf if leaf.dtype.itemsize >= 4 else leaf.astype(jnp.float32)
    return wide if units is None else wide.reshape(split_shape(leaf.shape, units))


def spread(values: Array, view: Array, units: Units | None) -> Array:
    """Return one value for all of a view, or one per unit in the shape of the view."""
    if units is None or values.size == 1:
        return values.reshape(())
    shape = unit_shape(view.shape, units._replace(groups=1))
    return shard_as(jnp.broadcast_to(values.reshape(shape), view.shape), view)
