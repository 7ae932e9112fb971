"""The two verbs on Keras gradients: the norm of each row, and their scaling."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from autoclip_core.clipper.units import Units, unit_shape

from .rows import Slot

# Between these, a sum of float32 squares lost nothing to overflow or to subnormals.
_LEAST_SAFE, _MOST_SAFE = 1e-25, 1e38

# XLA on CPU adds one after the other, and over many elements that gathers rounding.
_STRIP = 2**10

Tensor = Any


class Part(NamedTuple):
    """One gradient, or variable, and the rows it belongs to."""

    slot: Slot
    tensor: Tensor
    """Dense, or TensorFlow's `IndexedSlices`."""
    shape: tuple[int, ...]
    """The shape of the variable."""


class Dense:
    """A dense gradient, with the face that `sparse.Indexed` gives a sparse one."""

    def __init__(self, tensor: Tensor, shape: Sequence[int]) -> None:
        """Keep the tensor, and the shape that a graph may not know of it."""
        self.values = tensor
        self.shape = tuple(shape)

    def spread(self, scale: Tensor) -> Tensor:
        """Return the scale as it broadcasts against the values."""
        return scale

    def reduce(
        self, function: Callable[..., Tensor], values: Tensor, units: Units | None
    ) -> Tensor:
        """Reduce magnitudes to one number for each unit.

        Where a whole tensor has a long axis, it is reduced as a vector.
        """
        shape, every = self.shape, tuple(range(len(self.shape)))
        axes = every if units is None else tuple(sorted(units.axes))
        if axes == every and max(shape, default=0) > _STRIP:
            shape, axes = (math.prod(shape),), (0,)
        if tuple(values.shape) != shape:
            values = ops.reshape(values, shape)
        return _in_strips(function, values, axes)

    def with_values(self, values: Tensor) -> Tensor:
        """Return a gradient of the same kind."""
        return values


def row_norms(parts: Sequence[Part], rows: int) -> Tensor:
    """Return the norm of each row, shape (rows,), float32.

    Squares are summed in float32. Where that may have lost something (a sum that is
    infinite or tiny), each row is divided by its largest element first and summed
    again. A row of exact zeros costs that second pass too.

    Args:
      parts: gradients or variables.
      rows: how many rows there are.
    """
    faces = [_face(part, merge=True) for part in parts]
    squares = _add_up(parts, faces, rows, None)
    nothing = ops.convert_to_tensor(~has_norm(parts, rows))
    kept = ops.logical_and(squares > _LEAST_SAFE, squares < _MOST_SAFE)

    def again() -> Tensor:
        largest = _largest(parts, faces, rows)
        usable = ops.logical_and(largest > 0, ops.isfinite(largest))
        unit = ops.where(usable, largest, 1.0)
        return unit * ops.sqrt(_add_up(parts, faces, rows, unit))

    safe = ops.all(ops.logical_or(kept, nothing))
    return ops.cond(safe, lambda: ops.sqrt(squares), again)


def row_largest(parts: Sequence[Part], rows: int) -> Tensor:
    """Return the largest magnitude in each row, shape (rows,), float32."""
    return _largest(parts, [_face(part, merge=True) for part in parts], rows)


def has_norm(parts: Sequence[Part], rows: int) -> np.ndarray[Any, Any]:
    """Return which rows have a gradient; it is known when a step is traced."""
    seen = np.zeros((rows,), bool)
    for slot, *_ in parts:
        seen[slot.start : slot.stop] = True
    return seen


def scale_all(parts: Sequence[Part], scales: Tensor) -> list[Tensor]:
    """Return the gradients scaled; a row whose scale is 1 keeps its bits.

    Where no row is scaled, which is the rule, no gradient is written again.
    """

    def scaled() -> list[Tensor]:
        return [_scale(part, scales) for part in parts]

    def as_they_came() -> list[Tensor]:
        faces = [_face(part, merge=False) for part in parts]  # both branches as dense
        return [face.with_values(face.values) for face in faces]

    return list(ops.cond(ops.any(scales != 1), scaled, as_they_came))


def map_elements(function: Callable[[Tensor], Tensor], part: Part) -> Tensor:
    """Return the gradient with a function of its elements, duplicates summed first."""
    face = _face(part, merge=True)
    return face.with_values(ops.cast(function(face.values), part.tensor.dtype))


def _face(part: Part, *, merge: bool) -> Any:
    """Return what makes dense and sparse gradients look alike.

    Args:
      part: the gradient.
      merge: whether slices of the same index are summed first.
    """
    if not hasattr(part.tensor, "dense_shape"):
        return Dense(part.tensor, part.shape)
    from . import sparse  # only where TensorFlow is the backend

    if not sparse.has_rows(part.slot.units, part.shape):
        return Dense(sparse.to_dense(part.tensor), part.shape)
    indexed = sparse.Indexed(part.tensor, part.shape)
    return indexed.merged() if merge else indexed


def _scale(part: Part, scales: Tensor) -> Tensor:
    """Return scale * gradient where the scale is neither 0 nor 1, in float32 or wider.

    Slices need no summing of duplicates to be scaled, and stay slices.
    """
    face = _face(part, merge=False)
    own = ops.reshape(scales[part.slot.start : part.slot.stop], _one_each(part))
    scale = face.spread(own)
    wide = _wide(face.values)
    product = ops.where(scale == 0, 0.0, wide * ops.cast(scale, wide.dtype))
    narrow = ops.cast(product, face.values.dtype)
    return face.with_values(ops.where(scale == 1, face.values, narrow))


def _add_up(
    parts: Sequence[Part], faces: Sequence[Any], rows: int, unit: Tensor
) -> Tensor:
    """Return each row's sum of squares, after division by the row's unit."""

    def squares(part: Part, face: Any) -> Tensor:
        values = _wide(face.values)
        if unit is not None:
            own = ops.reshape(unit[part.slot.start : part.slot.stop], _one_each(part))
            values = values / ops.cast(face.spread(own), values.dtype)
        return face.reduce(ops.sum, ops.square(values), part.slot.units)

    return _by_row(parts, faces, rows, squares, ops.segment_sum)


def _largest(parts: Sequence[Part], faces: Sequence[Any], rows: int) -> Tensor:
    def largest(part: Part, face: Any) -> Tensor:
        return face.reduce(_max, ops.abs(_wide(face.values)), part.slot.units)

    # A row without a gradient has no largest element: segment_max says -inf.
    found = _by_row(parts, faces, rows, largest, ops.segment_max)
    return ops.maximum(found, 0.0)


def _by_row(
    parts: Sequence[Part],
    faces: Sequence[Any],
    rows: int,
    function: Callable[[Part, Any], Tensor],
    together: Callable[..., Tensor],
) -> Tensor:
    """Return one number per row; 0 where a row has no gradient.

    What the parts of a row have in common is found in one operation for all rows.
    """
    pairs = zip(parts, faces, strict=True)
    values = [ops.cast(ops.reshape(function(*p), (-1,)), "float32") for p in pairs]
    places = [np.arange(part.slot.start, part.slot.stop) for part in parts]
    if not parts:
        return ops.zeros((rows,), "float32")
    row, found = np.concatenate(places), ops.concatenate(values)
    if np.array_equal(row, np.arange(rows)):
        return found
    return together(found, row.astype(np.int32), num_segments=rows)


def _max(values: Tensor, axis: Any = None) -> Tensor:
    return ops.max(values, axis=axis, initial=0.0)


def _in_strips(
    function: Callable[..., Tensor], values: Tensor, axes: Sequence[int]
) -> Tensor:
    """Reduce magnitudes over ascending axes, at most `_STRIP` of them at a time."""
    if math.prod(values.shape[axis] for axis in axes) <= _STRIP:
        return function(values, axis=tuple(axes))
    if values.shape[axes[-1]] > _STRIP:
        return _in_strips(function, _shortened(function, values, axes[-1]), axes)
    return _in_strips(function, _stage(function, values, axes[-1]), axes[:-1])


def _shortened(function: Callable[..., Tensor], values: Tensor, axis: int) -> Tensor:
    """Return one number for each strip of the axis, then what is left over."""
    shape = tuple(values.shape)
    common = math.gcd(shape[axis], _STRIP)
    strip = common if common >= _STRIP // 8 else _STRIP  # nothing left is no copy
    strips, left = divmod(shape[axis], strip)
    whole, *rest = ops.split(values, [strips * strip], axis=axis) if left else [values]
    cut = ops.reshape(whole, (*shape[:axis], strips, strip, *shape[axis + 1 :]))
    found = _stage(function, cut, axis + 1)
    return ops.concatenate([found, *rest], axis=axis) if left else found


def _stage(function: Callable[..., Tensor], values: Tensor, axis: int) -> Tensor:
    """Reduce an axis; the maximum changes nothing, but XLA would merge two stages."""
    return ops.maximum(function(values, axis=axis), 0.0)


def _one_each(part: Part) -> tuple[int, ...]:
    """Return the shape of one number per unit that broadcasts against the variable."""
    units = part.slot.units
    return () if units is None else unit_shape(part.shape, units)


def _wide(values: Tensor) -> Tensor:
    """Return float32 or wider."""
    narrow = "16" in str(values.dtype)
    return ops.cast(values, "float32") if narrow else values
