"""A dense gradient, reduced in strips so that rounding does not accumulate."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from autoclip_core.clipper.units import Units

# XLA on the CPU adds one element after the other, so a long sum accumulates rounding.
_STRIP_LENGTH = 2**10

Tensor = Any


class DenseGradient:
    """A dense gradient, with the methods of `SparseGradient`."""

    def __init__(self, tensor: Tensor, shape: Sequence[int]) -> None:
        self.values = tensor
        self.shape = tuple(shape)

    def spread_scale(self, scale: Tensor) -> Tensor:
        """Return the scale: it broadcasts against the values."""
        return scale

    def reduce(
        self, function: Callable[..., Tensor], values: Tensor, units: Units | None
    ) -> Tensor:
        """Reduce magnitudes to one number for each unit.

        A whole tensor that has a long axis is reduced as a vector.
        """
        shape, all_axes = self.shape, tuple(range(len(self.shape)))
        axes = all_axes if units is None else tuple(sorted(units.axes))
        if axes == all_axes and max(shape, default=0) > _STRIP_LENGTH:
            shape, axes = (math.prod(shape),), (0,)
        if tuple(values.shape) != shape:
            values = ops.reshape(values, shape)
        return _reduce_in_strips(function, values, axes)

    def with_values(self, values: Tensor) -> Tensor:
        """Return a dense gradient with these values."""
        return values


def widen(values: Tensor) -> Tensor:
    """Return the values in float32 or wider."""
    is_narrow = "16" in str(values.dtype)
    return ops.cast(values, "float32") if is_narrow else values


def _reduce_in_strips(
    function: Callable[..., Tensor], values: Tensor, axes: Sequence[int]
) -> Tensor:
    """Reduce magnitudes over ascending axes, at most `_STRIP_LENGTH` at a time."""
    if math.prod(values.shape[axis] for axis in axes) <= _STRIP_LENGTH:
        return function(values, axis=tuple(axes))
    if values.shape[axes[-1]] > _STRIP_LENGTH:
        shorter = _reduce_strips(function, values, axes[-1])
        return _reduce_in_strips(function, shorter, axes)
    reduced = _reduce_axis(function, values, axes[-1])
    return _reduce_in_strips(function, reduced, axes[:-1])


def _reduce_strips(
    function: Callable[..., Tensor], values: Tensor, axis: int
) -> Tensor:
    """Return one number for each strip of the axis, then the elements left over."""
    shape = tuple(values.shape)
    divisor = math.gcd(shape[axis], _STRIP_LENGTH)
    # A strip length that divides the axis leaves nothing over, and saves a copy.
    length = divisor if divisor >= _STRIP_LENGTH // 8 else _STRIP_LENGTH
    strips, left = divmod(shape[axis], length)
    split_at = [strips * length]
    whole, *rest = ops.split(values, split_at, axis=axis) if left else [values]
    cut = ops.reshape(whole, (*shape[:axis], strips, length, *shape[axis + 1 :]))
    reduced = _reduce_axis(function, cut, axis + 1)
    return ops.concatenate([reduced, *rest], axis=axis) if left else reduced


def _reduce_axis(function: Callable[..., Tensor], values: Tensor, axis: int) -> Tensor:
    """Reduce one axis.

    The maximum with 0 changes no magnitude, but keeps XLA from merging two reductions.
    """
    return ops.maximum(function(values, axis=axis), 0.0)
