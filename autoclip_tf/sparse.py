"""The sparse gradient of an embedding, TensorFlow's `IndexedSlices`, kept sparse."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from autoclip_core.clipper.units import Units

Tensor = Any


class Indexed:
    """Rows of a gradient, by their index; the others are 0.

    Args:
      slices: the gradient.
      shape: the variable's shape.
    """

    def __init__(self, slices: tf.IndexedSlices, shape: Sequence[int]) -> None:
        """Keep the slices as they came."""
        self.values: Tensor = slices.values
        self.indices: Tensor = slices.indices
        self.shape = tuple(shape)
        self._dense_shape = slices.dense_shape

    def merged(self) -> "Indexed":
        """Return the same gradient, slices of one index summed in float32 or wider.

        The gradient of a token that comes twice is the sum of its two slices: the norm
        of the slices as they come is another number. There are as many slices as
        before, because XLA wants to know how many; those left over are 0.
        """
        values = self.values
        if values.dtype.size < 4:
            values = tf.cast(values, tf.float32)
        _, place = tf.unique(self.indices)
        count = tf.size(self.indices)
        summed = tf.math.unsorted_segment_sum(values, place, count)
        index = tf.math.unsorted_segment_max(self.indices, place, count)
        index = tf.maximum(index, tf.reduce_min(self.indices))  # where none is left
        return Indexed(tf.IndexedSlices(summed, index, self._dense_shape), self.shape)

    def spread(self, scale: Tensor) -> Tensor:
        """Return the scale of each slice, out of one or of one for each row."""
        if len(scale.shape) == 0 or scale.shape[0] == 1:
            return scale
        return tf.gather(scale, self.indices)

    def reduce(
        self, function: Callable[..., Tensor], values: Tensor, units: Units | None
    ) -> Tensor:
        """Reduce magnitudes to one number, or to one for each row of the variable."""
        if units is None or 0 in units.axes:
            return function(values)
        by_slice = function(values, axis=units.axes)
        return tf.math.unsorted_segment_sum(by_slice, self.indices, self.shape[0])

    def with_values(self, values: Tensor) -> tf.IndexedSlices:
        """Return a gradient of the same indices."""
        return tf.IndexedSlices(values, self.indices, self._dense_shape)


def has_rows(units: Units | None, shape: Sequence[int]) -> bool:
    """Tell whether units are the whole variable or its rows, which slices can keep."""
    return units is None or 0 not in units.axes or len(units.axes) == len(shape)


def to_dense(slices: tf.IndexedSlices) -> Tensor:
    """Return the gradient as a tensor."""
    return tf.convert_to_tensor(slices)
