"""Meshes with explicit axes: there JAX moves no array by itself.

What is not on such a mesh passes through, and so does everything before JAX had them.
"""

from typing import Any

import jax
from jax import Array


def replicated(value: Array) -> Array:
    """Return the value with a copy of the whole of it on each device."""
    placed = _explicit(value)
    if placed is None or all(axes is None for axes in placed.spec):
        return value
    nowhere: Any = jax.sharding.PartitionSpec(*[None] * value.ndim)  # type: ignore[no-untyped-call]
    return _reshard(value, jax.sharding.NamedSharding(placed.mesh, nowhere))


def spread_over(value: Array, like: Array) -> Array:
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
