"""The norm of each row of a pytree."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from autoclip_core.clipper.norms import to_rms
from autoclip_core.clipper.units import Units
from autoclip_core.scale import square_root

from .leaves import (
    RowLeaves,
    count_elements,
    has_gradient,
    list_row_leaves,
    spread,
    widen,
)
from .mesh import get_type, reduce_pieces, replicate
from .rows import Rows

_MOST_STACKED = 2**20  # elements that may be copied
# Between these, a sum of float32 squares lost nothing to overflow or to subnormals.
_MIN_SAFE_SUM, _MAX_SAFE_SUM = 1e-25, 1e38

# A row is divided by the sum of its squares, limited to this range of powers of 2.
_SMALLEST_DIVISOR, _LARGEST_DIVISOR = np.float32(2.0**-80), np.float32(2.0**80)


def measure_norms(rows: Rows, tree: Any) -> Array:
    """Return the norm of each part of a row, shape (parts,).

    Norms are float32, or float64 if a leaf is. Squares are summed in the type of the
    leaf, at least float32. If a sum is infinite or tiny, or the row is zero, each row
    is divided by a number of about its size and summed again.

    Args:
      rows: which leaf belongs to which row.
      tree: the gradients, or the parameters.
    """
    leaves = list_row_leaves(rows, tree)
    if not leaves:
        return jnp.zeros((rows.part_count,), jnp.float32)
    if rows.norm == "max":
        return _reduce_rows(rows, leaves, _find_largest, jnp.maximum, lax.pmax)
    squares = _reduce_rows(rows, leaves, _sum_squares, jnp.add, lax.psum)
    is_exact = (squares > _MIN_SAFE_SUM) & (squares < _MAX_SAFE_SUM)
    is_safe = jnp.all(is_exact | ~has_gradient(rows, tree))
    divisors = _choose_divisors(squares)
    sum_again = partial(_sum_scaled_squares, rows, leaves, divisors)
    # Outside of a trace, `cond` would compile its branches again in every step.
    if isinstance(is_safe, jax.core.Tracer):
        squares = lax.cond(is_safe, lambda: squares, sum_again)
    elif not is_safe:
        squares = sum_again()
    norms: Array = square_root(squares, jnp)
    if rows.norm == "rms":
        norms = to_rms(norms, count_elements(rows, tree).astype(norms.dtype), jnp)
    return jnp.where(is_safe, 1.0, divisors) * norms


def _choose_divisors(squares: Array) -> Array:
    """Return a divisor of each row, after which no square of an element is lost."""
    least, most = np.array([_SMALLEST_DIVISOR, _LARGEST_DIVISOR], squares.dtype)
    divisors: Array = lax.stop_gradient(lax.clamp(least, squares, most))
    return divisors


def _find_norm_type(leaves: RowLeaves) -> Any:
    """Return float64 if a leaf has that precision, else float32."""
    doubles = np.dtype("float64"), np.dtype("complex128")
    is_double = any(leaf.dtype in doubles for _, leaf in leaves)
    return jnp.float64 if is_double else jnp.float32


def _reduce_rows(
    rows: Rows, leaves: RowLeaves, reduce: Any, combine: Any, collective: Any
) -> Array:
    """Return one number for each part of a row: leaves are reduced, then combined."""
    values: dict[int, Array] = {}
    kind = _find_norm_type(leaves)
    for parameter, leaf in leaves:
        value = reduce(leaf, parameter.units).astype(kind)
        value = reduce_pieces(collective, value, rows.axis_name)
        row = parameter.start
        values[row] = combine(values[row], value) if row in values else value
    return _join_rows(rows, values)


def _sum_scaled_squares(rows: Rows, leaves: RowLeaves, divisors: Array) -> Array:
    """Return the sum of the squares of each row, divided by its divisor before.

    XLA compiles this rare pass into each step. So it stacks small leaves of one type.
    """
    groups: dict[Any, RowLeaves] = {}
    copied = 0
    for index, (parameter, leaf) in enumerate(leaves):
        fits = copied + leaf.size <= _MOST_STACKED
        copied += leaf.size * fits
        key = get_type(leaf), parameter.units, None if fits else index
        groups.setdefault(key, []).append((parameter, leaf))
    order = [p for pairs in groups.values() for p, _ in pairs]
    places = np.concatenate([range(p.start, p.stop) for p in order])
    ordered, sums, end = divisors[places], [], 0
    for (_, units, _), pairs in groups.items():
        start, end = end, end + sum(p.stop - p.start for p, _ in pairs)
        stacked = jnp.stack([leaf for _, leaf in pairs])
        sum_leaves = jax.vmap(partial(_sum_squares, units=units))
        leaf_divisors = ordered[start:end].reshape(len(pairs), -1)
        squares = sum_leaves(stacked, divisor=leaf_divisors)
        sums.append(reduce_pieces(lax.psum, squares.reshape(-1), rows.axis_name))
    added = jnp.concatenate(sums, dtype=divisors.dtype)
    return jnp.zeros_like(divisors).at[places].add(added)


# JAX traces a function of `jit` once for all leaves of a type.
@partial(jax.jit, static_argnames="units")
def _sum_squares(
    leaf: Array, units: Units | None, divisor: Array | None = None
) -> Array:
    """Return the sum of squares of one leaf, or one per unit, shape (its rows,)."""
    view = _magnitudes(leaf, units) if jnp.iscomplexobj(leaf) else widen(leaf, units)
    if divisor is not None:
        view = view / spread(divisor.astype(view.dtype), view, units)
    return _reduce_units(jnp.sum, jnp.square(view), units)


def _find_largest(leaf: Array, units: Units | None) -> Array:
    """Return the largest magnitude of one leaf, or one per unit; infinity for a NaN."""
    magnitudes = _magnitudes(leaf, units)
    # Not every maximum returns a NaN.
    magnitudes = jnp.where(jnp.isnan(magnitudes), jnp.inf, magnitudes)
    return _reduce_units(partial(jnp.max, initial=0.0), magnitudes, units)


def _reduce_units(function: Any, view: Array, units: Units | None) -> Array:
    """Return a function of all of a view, or of each unit, shape (its rows,)."""
    if units is None:
        return replicate(function(view))
    return replicate(function(view, axis=units.axes)).reshape(-1)


def _magnitudes(leaf: Array, units: Units | None) -> Array:
    """Return |leaf| in float32 or wider; its axes are split if the units need it."""
    return widen(jnp.abs(leaf), units)


def _join_rows(rows: Rows, values: dict[int, Any]) -> Array:
    """Return one vector over the parts; it is 0 for a part without a value."""
    widths = {p.start: p.stop - p.start for p in rows.parameters if p.stop > p.start}
    vectors: list[Array] = []
    kind = jnp.result_type(*values.values())
    zero, end = jnp.zeros((), kind), 0
    for start in (*sorted(widths), rows.part_count):
        if start > end:  # a row that is scaled as a whole has no second part
            vectors.append(jnp.zeros((start - end,), kind))
        end = start + widths.get(start, 0)
        vectors.append(jnp.broadcast_to(values.get(start, zero), (end - start,)))
    return jnp.concatenate(vectors)
