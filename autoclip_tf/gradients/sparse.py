"""The sparse gradient of an embedding, TensorFlow's `IndexedSlices`, kept sparse."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from autoclip_core.clipper.units import Units

if keras.backend.backend() == "tensorflow":  # no other backend has sparse gradients
    import tensorflow as tf

Tensor = Any
IndexedSlices = Any
"""`tf.IndexedSlices`, a name that exists only on TensorFlow."""


class SparseGradient:
    """The slices of a gradient and their indices; all other elements are 0.

    Args:
      slices: the gradient.
      shape: the variable's shape.
    """

    def __init__(self, slices: IndexedSlices, shape: Sequence[int]) -> None:
        self.values: Tensor = slices.values
        self.indices: Tensor = slices.indices
        self.shape = tuple(shape)
        self._dense_shape = slices.dense_shape

    def merge(self) -> "SparseGradient":
        """Return the same gradient, slices of one index summed in float32 or wider.

        The gradient of a token that occurs twice is the sum of its two slices. The norm
        of the unsummed slices is a different number. The result has as many slices as
        before, because XLA needs a static number; the slices left over are 0.
        """
        values = self.values
        if values.dtype.size < 4:
            values = tf.cast(values, tf.float32)
        _, place = tf.unique(self.indices)
        count = tf.size(self.indices)
        summed = tf.math.unsorted_segment_sum(values, place, count)
        index = tf.math.unsorted_segment_max(self.indices, place, count)
        # A slice left over gets the smallest index: any valid one serves.
        index = tf.maximum(index, tf.reduce_min(self.indices))
        slices = tf.IndexedSlices(summed, index, self._dense_shape)
        return SparseGradient(slices, self.shape)

    def spread_scale(self, scale: Tensor) -> Tensor:
        """Return the scale of each slice, from one scale or one per row."""
        if len(scale.shape) == 0 or scale.shape[0] == 1:
            return scale
        return tf.gather(scale, self.indices)

    def reduce(
        self, function: Callable[..., Tensor], values: Tensor, units: Units | None
    ) -> Tensor:
        """Reduce magnitudes to one number, or to one per row of the variable."""
        if units is None or 0 in units.axes:
            return function(values)
        by_slice = function(values, axis=units.axes)
        return tf.math.unsorted_segment_sum(by_slice, self.indices, self.shape[0])

    def with_values(self, values: Tensor) -> IndexedSlices:
        """Return a gradient with the same indices."""
        return tf.IndexedSlices(values, self.indices, self._dense_shape)


def densify(gradient: Tensor) -> Tensor:
    """Return a sparse gradient of JAX (`BCOO`) or torch as a dense one.

    Any other gradient is returned unchanged; those of TensorFlow stay sparse.
    """
    if hasattr(gradient, "todense"):
        return gradient.todense()
    return gradient.to_dense() if getattr(gradient, "is_sparse", False) else gradient


def can_stay_sparse(units: Units | None, shape: Sequence[int]) -> bool:
    """Return whether each unit is the whole variable or one of its rows."""
    return units is None or 0 not in units.axes or len(units.axes) == len(shape)


def to_dense(slices: IndexedSlices) -> Tensor:
    """Return the gradient as a tensor."""
    return tf.convert_to_tensor(slices)
