"""The two verbs on a pytree: the norm of each row, and updates times their scale."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from autoclip_core.clipper.units import Units, split_shape, unit_shape

from .rows import Rows, Slot, is_gradient, is_none

# Between these, a sum of float32 squares lost nothing to overflow or to subnormals.
_LEAST_SAFE, _MOST_SAFE = 1e-25, 1e38


def row_norms(rows: Rows, tree: Any, axis_name: Any = None) -> Array:
    """Return the norm of each row, shape (rows,), float32.

    Squares are summed in float32. Where that may have lost something (a sum that is
    infinite or tiny), each row is divided by its largest element first and summed
    again. A row of exact zeros costs that second pass too.

    Args:
      rows: which leaf belongs to which row.
      tree: the gradients, or the parameters.
      axis_name: mesh axes that cut a gradient into pieces, inside `shard_map`.
    """
    parts = [
        (slot, leaf)
        for slot, leaf in zip(rows.slots, leaves_of(tree), strict=True)
        if is_gradient(leaf)
    ]
    if not parts:
        return jnp.zeros((len(rows.names),), jnp.float32)
    squares = _add_up(rows, parts, None, axis_name)
    safe = jnp.all(
        (squares > _LEAST_SAFE) & (squares < _MOST_SAFE) | ~has_norm(rows, tree)
    )

    def again() -> Array:
        largest = _largest(rows, parts, axis_name)
        unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
        # XLA multiplies by 1 / unit, which must not be subnormal: it would be flushed.
        unit = jnp.minimum(unit, 1e30)
        return unit * jnp.sqrt(_add_up(rows, parts, unit, axis_name))

    # Outside of a trace `cond` would compile its branches anew in every step.
    if not isinstance(safe, jax.core.Tracer):
        return jnp.sqrt(squares) if safe else again()
    norms: Array = lax.cond(safe, lambda: jnp.sqrt(squares), again)
    return norms


def has_norm(rows: Rows, tree: Any) -> Array:
    """Return which rows have a gradient; it is known when the step is traced."""
    seen = [False] * len(rows.names)
    for slot, leaf in zip(rows.slots, leaves_of(tree), strict=True):
        if is_gradient(leaf):
            seen[slot.start : slot.stop] = [True] * (slot.stop - slot.start)
    return jnp.array(seen, bool)


def scale_tree(rows: Rows, tree: Any, scales: Array) -> Any:
    """Return the tree scaled row by row; a scale of 1 keeps the bits of a leaf."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    scaled = [
        _scale(leaf, scales[slot.start : slot.stop], slot.units)
        if is_gradient(leaf)
        else leaf
        for slot, leaf in zip(rows.slots, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, scaled)


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of a tree, `None` among them."""
    return jax.tree.leaves(tree, is_leaf=is_none)


def _scale(leaf: Array, scales: Array, units: Units | None) -> Array:
    """Return scale * leaf where the scale is neither 0 nor 1, in float32 or wider."""
    view = leaf if units is None else leaf.reshape(split_shape(leaf.shape, units))
    scale = scales.reshape(() if units is None else unit_shape(leaf.shape, units))
    if units is not None:
        scale = _spread_over(jnp.broadcast_to(scale, view.shape), view)
    wide = view if view.dtype.itemsize >= 4 else view.astype(jnp.float32)
    product = jnp.where(
        scale == 0, jnp.zeros_like(wide), wide * scale.astype(wide.dtype)
    )
    chosen = jnp.where(scale == 1, view, product.astype(leaf.dtype))
    return chosen.reshape(leaf.shape)


def _add_up(
    rows: Rows, parts: Sequence[tuple[Slot, Array]], unit: Array | None, axes: Any
) -> Array:
    """Return each row's sum of squares, after division by the row's unit."""
    sums: dict[int, list[Array]] = {}
    for slot, leaf in parts:
        divisor = None if unit is None else unit[slot.start : slot.stop]
        sums.setdefault(slot.start, []).append(_squares(leaf, slot, divisor, axes))
    return _lay_out(rows, {start: sum(of_row) for start, of_row in sums.items()})


def _squares(leaf: Array, slot: Slot, unit: Array | None, axes: Any) -> Array:
    """Return the sums of squares of one leaf, one per unit, shape (its rows,)."""
    view = _magnitudes(leaf, slot)
    if unit is not None:
        divisor = unit.reshape(_one_per_unit(leaf, slot)).astype(view.dtype)
        if slot.units is not None:
            divisor = _spread_over(jnp.broadcast_to(divisor, view.shape), view)
        view = view / divisor
    over = None if slot.units is None else slot.units.axes
    total = _replicate(jnp.sum(jnp.square(view), axis=over))
    return _reduce(lax.psum, total.reshape(-1).astype(jnp.float32), axes)


def _largest(rows: Rows, parts: Sequence[tuple[Slot, Array]], axes: Any) -> Array:
    tops: dict[int, Array] = {}
    for slot, leaf in parts:
        over = None if slot.units is None else slot.units.axes
        top = _replicate(jnp.max(_magnitudes(leaf, slot), axis=over, initial=0.0))
        top = _reduce(lax.pmax, top.reshape(-1).astype(jnp.float32), axes)
        tops[slot.start] = jnp.maximum(tops.get(slot.start, 0.0), top)
    return _lay_out(rows, tops)


def _magnitudes(leaf: Array, slot: Slot) -> Array:
    """Return |leaf| in float32 or wider, cut into groups where its units need it."""
    magnitudes = jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf
    if magnitudes.dtype.itemsize < 4:
        magnitudes = magnitudes.astype(jnp.float32)
    magnitudes = jnp.abs(magnitudes)
    if slot.units is None:
        return magnitudes
    return magnitudes.reshape(split_shape(leaf.shape, slot.units))


def _one_per_unit(leaf: Array, slot: Slot) -> tuple[int, ...]:
    return () if slot.units is None else unit_shape(leaf.shape, slot.units)


def _lay_out(rows: Rows, values: dict[int, Any]) -> Array:
    """Return one vector over the rows; 0 where a row has nothing."""
    widths = {s.start: s.stop - s.start for s in rows.slots if s.stop > s.start}
    return jnp.concatenate(
        [
            jnp.broadcast_to(
                values.get(start, jnp.zeros((), jnp.float32)), (widths[start],)
            )
            for start in sorted(widths)
        ]
    )


def _reduce(collective: Any, value: Array, axes: Any) -> Array:
    """Add up the pieces of a gradient over the axes it is cut along, and no others.

    A replicated leaf would be counted once per device. Which axes a value varies along
    is part of its type where `shard_map` checks it; elsewhere (`pmap`, or with
    `check_vma=False`) every leaf is taken to be cut along all given axes.
    """
    if axes is None:
        return value
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    known = all(name in _varying(lax.axis_index(name)) for name in names)
    over = tuple(n for n in names if not known or n in _varying(value))
    return collective(value, over) if over else value


def _varying(value: Array) -> frozenset[str]:
    """Return the axes that a value is known to vary along: JAX named this anew twice.

    Before 0.7 no type says it, and nothing is known.
    """
    kind = jax.typeof(value) if hasattr(jax, "typeof") else None
    manual = getattr(kind, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(kind, "vma", frozenset()))


# On meshes with explicit axes JAX moves no array by itself. A value that is on no such
# mesh is returned unchanged, and so is every value on JAX versions without them.


def _replicate(value: Array) -> Array:
    """Return the value with a copy of the whole of it on each device."""
    placed = _explicit(value)
    if placed is None or all(axes is None for axes in placed.spec):
        return value
    nowhere: Any = jax.sharding.PartitionSpec(*[None] * value.ndim)  # type: ignore[no-untyped-call]
    return _reshard(value, jax.sharding.NamedSharding(placed.mesh, nowhere))


def _spread_over(value: Array, like: Array) -> Array:
    """Return a value of the same shape, cut among the devices as another one is."""
    placed = _explicit(like)
    return value if placed is None else _reshard(value, placed)


def _explicit(value: Array) -> Any:
    """Return how a value lies on a mesh with explicit axes, or None."""
    kind = jax.typeof(value) if hasattr(jax, "typeof") else None
    placed = getattr(kind, "sharding", None)
    axes = getattr(getattr(placed, "mesh", None), "axis_types", None) or ()
    return placed if any(axis.name == "Explicit" for axis in axes) else None


def _reshard(value: Array, placed: Any) -> Array:
    moved: Array = jax.sharding.reshard(value, placed)  # type: ignore[no-untyped-call]
    return moved
