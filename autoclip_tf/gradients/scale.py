"""Gradients times the scales of their rows, or a function of their elements."""

from collections.abc import Callable, Sequence

from keras import ops

from .dense import Tensor, widen
from .row_tensor import RowTensor, take_rows, wrap


def scale_all(tensors: Sequence[RowTensor], scales: Tensor) -> list[Tensor]:
    """Return the gradients scaled; a row whose scale is 1 is unchanged bit for bit.

    In most steps no row is scaled; then no gradient is written.
    """

    def scaled() -> list[Tensor]:
        return [_scale(item, scales) for item in tensors]

    def unchanged() -> list[Tensor]:
        # Both branches must return the same kind: some slices are made dense.
        gradients = [wrap(item, merge=False) for item in tensors]
        return [gradient.with_values(gradient.values) for gradient in gradients]

    return list(ops.cond(ops.any(scales != 1), scaled, unchanged))


def map_elements(function: Callable[[Tensor], Tensor], item: RowTensor) -> Tensor:
    """Return a function of each element of a gradient, after duplicates are summed."""
    gradient = wrap(item, merge=True)
    return gradient.with_values(ops.cast(function(gradient.values), item.tensor.dtype))


def _scale(item: RowTensor, scales: Tensor) -> Tensor:
    """Return scale * gradient in float32 or wider, unless the scale is 0 or 1.

    A scale of 0 gives 0 and a scale of 1 the gradient itself. Duplicate slices need not
    be summed to be scaled, and stay slices.
    """
    gradient = wrap(item, merge=False)
    scale = gradient.spread_scale(take_rows(scales, item))
    wide = widen(gradient.values)
    product = ops.where(scale == 0, 0.0, wide * ops.cast(scale, wide.dtype))
    narrow = ops.cast(product, gradient.values.dtype)
    return gradient.with_values(ops.where(scale == 1, gradient.values, narrow))
