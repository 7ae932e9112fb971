"""The norm of each row of a pytree, and the updates times their scales."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from autoclip_core.clipper.norms import to_rms
from autoclip_core.clipper.units import (
    ParameterRows,
    Units,
    row_size,
    split_shape,
    unit_shape,
)
from autoclip_core.scale import square_root

from .rows import Rows, is_gradient, is_none

# Between these, a sum of float32 squares lost nothing to overflow or to subnormals.
_MIN_SAFE_SUM, _MAX_SAFE_SUM = 1e-25, 1e38


def measure_norms(
    rows: Rows, tree: Any, axis_name: Any = None, norm: str = "l2"
) -> Array:
    """Return the norm of each part of a row, shape (parts,), float32.

    Squares are summed in float32. If a sum is infinite or tiny, precision may be lost:
    then each row is divided by its largest element and summed again. A row of exact
    zeros also costs this second pass.

    Args:
      rows: which leaf belongs to which row.
      tree: the gradients, or the parameters.
      axis_name: as in `clip_by_policy`.
      norm: as in `clip_by_policy`.
    """
    parts = _list_parts(rows, tree)
    if not parts:
        return jnp.zeros((rows.part_count,), jnp.float32)
    if norm == "max":
        return _largest_magnitudes(rows, parts, axis_name, _magnitudes_or_infinity)
    sizes = count_elements(rows, tree, axis_name) if norm == "rms" else None
    squares = _sum_squares(rows, parts, None, axis_name)
    is_exact = (squares > _MIN_SAFE_SUM) & (squares < _MAX_SAFE_SUM)
    is_safe = jnp.all(is_exact | ~has_gradient(rows, tree))

    def measure_again() -> Array:
        largest = _largest_magnitudes(rows, parts, axis_name, _magnitudes)
        divisor = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
        # XLA multiplies by 1 / divisor. If that is subnormal, XLA flushes it to 0.
        divisor = jnp.minimum(divisor, 1e30)
        return divisor * root(_sum_squares(rows, parts, divisor, axis_name))

    def root(sums: Array) -> Array:
        norms: Array = square_root(sums, jnp)
        return norms if sizes is None else to_rms(norms, sizes, jnp)

    # Outside of a trace, `cond` would compile its branches again in every step.
    if not isinstance(is_safe, jax.core.Tracer):
        return root(squares) if is_safe else measure_again()
    norms: Array = lax.cond(is_safe, lambda: root(squares), measure_again)
    return norms


def count_elements(rows: Rows, tree: Any, axis_name: Any = None) -> Array:
    """Return the number of elements of each part that has a gradient, as float32."""
    sizes = np.zeros((rows.part_count,), np.float32)
    for parameter, leaf in _list_parts(rows, tree):
        axes = _find_cutting_axes(leaf, axis_name)
        # A sum of ones is a plain number, known when tracing.
        pieces = lax.psum(1, axes) if axes else 1  # type: ignore[no-untyped-call]
        size = pieces * row_size(leaf.shape, parameter)
        sizes[parameter.start : parameter.stop] += size
    return jnp.asarray(sizes)


def _list_parts(rows: Rows, tree: Any) -> list[tuple[ParameterRows, Array]]:
    """Return the leaves that have a norm, each with its rows."""
    pairs = zip(rows.parameters, list_leaves(tree), strict=True)
    return [(parameter, leaf) for parameter, leaf in pairs if is_gradient(leaf)]


def has_gradient(rows: Rows, tree: Any) -> Array:
    """Return for each part whether it has a gradient; tracing a step decides it."""
    observed = [False] * rows.part_count
    for parameter, leaf in zip(rows.parameters, list_leaves(tree), strict=True):
        if is_gradient(leaf):
            count = parameter.stop - parameter.start
            observed[parameter.start : parameter.stop] = [True] * count
    return jnp.array(observed, bool)


def scale_updates(rows: Rows, tree: Any, scales: Array) -> Any:
    """Return the tree scaled part by part; a scale of 1 leaves each bit of a leaf."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    scaled = [
        _scale(leaf, scales[parameter.start : parameter.stop], parameter.units)
        if is_gradient(leaf)
        else leaf
        for parameter, leaf in zip(rows.parameters, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, scaled)


def list_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, including each `None`."""
    return jax.tree.leaves(tree, is_leaf=is_none)


def _scale(leaf: Array, scales: Array, units: Units | None) -> Array:
    """Return scale * leaf in float32 or wider; scales of 0 and 1 do not multiply."""
    view = leaf if units is None else leaf.reshape(split_shape(leaf.shape, units))
    scale = scales.reshape(() if units is None else unit_shape(leaf.shape, units))
    if units is not None:
        scale = _shard_as(jnp.broadcast_to(scale, view.shape), view)
    wide = view if view.dtype.itemsize >= 4 else view.astype(jnp.float32)
    product = wide * scale.astype(wide.dtype)
    product = jnp.where(scale == 0, jnp.zeros_like(wide), product)
    selected = jnp.where(scale == 1, view, product.astype(leaf.dtype))
    return selected.reshape(leaf.shape)


def average(value: Array, axis_name: Any) -> Array:
    """Return the mean of a number over the mesh axes along which it varies."""
    return _reduce(lax.pmean, value, axis_name)


def _sum_squares(
    rows: Rows,
    parts: Sequence[tuple[ParameterRows, Array]],
    divisors: Array | None,
    axes: Any,
) -> Array:
    """Return each row's sum of squares, after division by the row's divisor."""
    sums: dict[int, Any] = {}
    for parameter, leaf in parts:
        squares = _sum_leaf_squares(leaf, parameter, divisors, axes)
        sums[parameter.start] = sums.get(parameter.start, 0) + squares
    return _join_rows(rows, sums)


def _sum_leaf_squares(
    leaf: Array, parameter: ParameterRows, divisors: Array | None, axes: Any
) -> Array:
    """Return the sums of squares of one leaf, one per unit, shape (its rows,)."""
    units = parameter.units
    view = _magnitudes(leaf, units)
    if divisors is not None:
        shape = () if units is None else unit_shape(leaf.shape, units)
        divisor = divisors[parameter.start : parameter.stop]
        divisor = divisor.reshape(shape).astype(view.dtype)
        if units is not None:
            divisor = _shard_as(jnp.broadcast_to(divisor, view.shape), view)
        view = view / divisor
    unit_axes = None if units is None else units.axes
    total = _replicate(jnp.sum(jnp.square(view), axis=unit_axes))
    return _reduce(lax.psum, total.reshape(-1).astype(jnp.float32), axes)


def _largest_magnitudes(
    rows: Rows,
    parts: Sequence[tuple[ParameterRows, Array]],
    axes: Any,
    magnitudes: Callable[[Array, Units | None], Array],
) -> Array:
    """Return the largest magnitude of each row."""
    largest: dict[int, Array] = {}
    for parameter, leaf in parts:
        units = parameter.units
        unit_axes = None if units is None else units.axes
        top = jnp.max(magnitudes(leaf, units), axis=unit_axes, initial=0.0)
        top = _replicate(top).reshape(-1).astype(jnp.float32)
        top = _reduce(lax.pmax, top, axes)
        largest[parameter.start] = jnp.maximum(largest.get(parameter.start, 0.0), top)
    return _join_rows(rows, largest)


def _magnitudes(leaf: Array, units: Units | None) -> Array:
    """Return |leaf| in float32 or wider; its axes are split if the units need it."""
    magnitudes = jnp.abs(leaf)
    if magnitudes.dtype.itemsize < 4:
        magnitudes = magnitudes.astype(jnp.float32)
    shape = leaf.shape if units is None else split_shape(leaf.shape, units)
    return magnitudes.reshape(shape)


def _magnitudes_or_infinity(leaf: Array, units: Units | None) -> Array:
    """Return the same, infinity for a NaN: not every maximum returns a NaN."""
    magnitudes = _magnitudes(leaf, units)
    return jnp.where(jnp.isnan(magnitudes), jnp.inf, magnitudes)


def _join_rows(rows: Rows, values: dict[int, Any]) -> Array:
    """Return one vector over the parts; it is 0 for a part without a value."""
    widths = {p.start: p.stop - p.start for p in rows.parameters if p.stop > p.start}
    vectors: list[Array] = []
    zero, end = jnp.zeros((), jnp.float32), 0
    for start in (*sorted(widths), rows.part_count):
        if start > end:  # a row that is scaled as a whole has no second part
            vectors.append(jnp.zeros((start - end,), jnp.float32))
        end = start + widths.get(start, 0)
        vectors.append(jnp.broadcast_to(values.get(start, zero), (end - start,)))
    return jnp.concatenate(vectors)


def _reduce(collective: Any, value: Array, axes: Any) -> Array:
    """Reduce the pieces of a gradient over the axes that cut it, and over no others.

    Over another axis, a replicated leaf would be counted once per device. Inside
    `shard_map` with its checks, a value's type has the axes along which it varies.
    Elsewhere (`pmap`, or `check_vma=False`) all given axes are assumed to cut every
    leaf.
    """
    cutting = _find_cutting_axes(value, axes)
    return collective(value, cutting) if cutting else value


def _find_cutting_axes(value: Array, axes: Any) -> tuple[str, ...]:
    """Return those of the given axes that cut a value into pieces; see `_reduce`."""
    if axes is None:
        return ()
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    is_typed = all(name in _varying_axes(lax.axis_index(name)) for name in names)
    return tuple(n for n in names if not is_typed or n in _varying_axes(value))


def _varying_axes(value: Array) -> frozenset[str]:
    """Return the axes along which a value varies, according to its type.

    The attribute has changed its name twice. Before JAX 0.7 no type has it, and the
    result is empty.
    """
    kind = jax.typeof(value) if hasattr(jax, "typeof") else None
    manual = getattr(kind, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(kind, "vma", frozenset()))


# On a mesh with explicit axes, JAX moves no array by itself. A value on no such mesh is
# returned unchanged, and so is every value on JAX versions without explicit axes.


def _replicate(value: Array) -> Array:
    """Return the value with a whole copy on each device."""
    sharding = _explicit_sharding(value)
    if sharding is None or all(axes is None for axes in sharding.spec):
        return value
    spec: Any = jax.sharding.PartitionSpec(*[None] * value.ndim)  # type: ignore[no-untyped-call]
    return _reshard(value, jax.sharding.NamedSharding(sharding.mesh, spec))


def _shard_as(value: Array, like: Array) -> Array:
    """Return a value of the same shape as `like`, sharded as `like` is."""
    sharding = _explicit_sharding(like)
    return value if sharding is None else _reshard(value, sharding)


def _explicit_sharding(value: Array) -> Any:
    """Return the sharding of a value on a mesh with explicit axes, otherwise None."""
    kind = jax.typeof(value) if hasattr(jax, "typeof") else None
    sharding = getattr(kind, "sharding", None)
    axes = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    return sharding if any(axis.name == "Explicit" for axis in axes) else None


def _reshard(value: Array, sharding: Any) -> Array:
    resharded: Array = jax.sharding.reshard(value, sharding)  # type: ignore[no-untyped-call]
    return resharded
