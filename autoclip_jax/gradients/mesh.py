"""Values on several devices: reductions over mesh axes, and explicit shardings."""

from typing import Any

import jax
import numpy as np
from jax import Array, lax


def reduce_pieces(collective: Any, value: Array, axes: Any) -> Array:
    """Reduce the pieces of a gradient over the axes that cut it, and over no others.

    Over another axis, a replicated leaf would be counted once per device. Inside
    `shard_map` with its checks, a value's type has the axes along which it varies.
    Elsewhere (`pmap`, or `check_vma=False`) all given axes are assumed to cut every
    leaf.
    """
    cutting = find_cutting_axes(value, axes)
    return collective(value, cutting) if cutting else value


def find_cutting_axes(value: Array, axes: Any) -> tuple[str, ...]:
    """Return those axes that cut a value into pieces; see `reduce_pieces`."""
    if axes is None:
        return ()
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    is_typed = all(name in _varying_axes(lax.axis_index(name)) for name in names)
    return tuple(n for n in names if not is_typed or n in _varying_axes(value))


def get_type(value: Array) -> Any:
    """Return the shape and the type of a value, and how it lies on a mesh."""
    is_typed = hasattr(jax, "typeof")
    return jax.typeof(value) if is_typed else (value.shape, value.dtype)


def _varying_axes(value: Array) -> frozenset[str]:
    """Return the axes along which a value varies, according to its type.

    The attribute has changed its name twice. Before JAX 0.7 no type has it, and the
    result is empty.
    """
    kind = get_type(value)
    manual = getattr(kind, "manual_axis_type", None)
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(kind, "vma", frozenset()))


# On a mesh with explicit axes, JAX moves no array by itself. A value on no such mesh is
# returned unchanged, and so is every value on JAX versions without explicit axes.


def replicate(value: Array) -> Array:
    """Return the value with a whole copy on each device."""
    sharding = _explicit_sharding(value)
    if sharding is None or all(axes is None for axes in sharding.spec):
        return value
    spec: Any = jax.sharding.PartitionSpec(*[None] * value.ndim)  # type: ignore[no-untyped-call]
    return _reshard(value, jax.sharding.NamedSharding(sharding.mesh, spec))


def shard_as(value: Array, like: Array) -> Array:
    """Return a value of the same shape as `like`, sharded as `like` is."""
    sharding = _explicit_sharding(like)
    return value if sharding is None else _reshard(value, sharding)


def _explicit_sharding(value: Array) -> Any:
    """Return the sharding of a value on a mesh with explicit axes, otherwise None."""
    kind = get_type(value)
    sharding = getattr(kind, "sharding", None)
    axes = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    return sharding if any(axis.name == "Explicit" for axis in axes) else None


def _reshard(value: Array, sharding: Any) -> Array:
    resharded: Array = jax.sharding.reshard(value, sharding)  # type: ignore[no-untyped-call]
    return resharded


def average(value: Array, axis_name: Any) -> Array:
    """Return the mean of a number over the mesh axes along which it varies."""
    return reduce_pieces(lax.pmean, value, axis_name)


def has_unequal_copies(array: Array) -> bool:
    """Return whether copies of the same part differ between devices.

    `pmap`, and `shard_map` with `check_vma=False`, do not check that an output without
    a mapped axis is equal on all devices.
    """
    first: dict[str, Any] = {}
    for shard in array.addressable_shards:
        like = first.setdefault(str(shard.index), shard.data)
        if like is not shard.data and not is_equal(like, shard.data).all():
            return True
    return False


def is_equal(values: Any, others: Any) -> Any:
    """Return which values are equal, up to the order in which devices add."""
    return np.isclose(values, others, rtol=1e-3, equal_nan=True)
