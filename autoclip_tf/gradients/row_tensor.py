"""`RowTensor`: a gradient, or a variable, with its rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from autoclip_core.clipper.units import ParameterRows, row_size, unit_shape

from .dense import DenseGradient, Tensor
from .sparse import SparseGradient, can_stay_sparse, to_dense


class RowTensor(NamedTuple):
    """A gradient, or a variable, and its rows. A row may have several of them."""

    rows: ParameterRows
    tensor: Tensor
    """A dense tensor, or TensorFlow's `IndexedSlices`."""
    shape: tuple[int, ...]
    """The shape of the variable."""


def count_elements(tensors: Sequence[RowTensor], row_count: int) -> Tensor:
    """Return the number of elements of each row; a sparse gradient counts whole."""
    sizes = np.zeros((row_count,), np.float32)
    for rows, _, shape in tensors:
        sizes[rows.start : rows.stop] += row_size(shape, rows)
    return ops.convert_to_tensor(sizes)


def find_observed(tensors: Sequence[RowTensor], row_count: int) -> np.ndarray[Any, Any]:
    """Return which rows have a gradient; this is known when a step is traced."""
    has_gradient = np.zeros((row_count,), bool)
    for rows, *_ in tensors:
        has_gradient[rows.start : rows.stop] = True
    return has_gradient


def take_rows(by_row: Tensor, item: RowTensor) -> Tensor:
    """Return the entries of an item from one number per row, to broadcast with it."""
    units = item.rows.units
    shape = () if units is None else unit_shape(item.shape, units)
    return ops.reshape(by_row[item.rows.start : item.rows.stop], shape)


def wrap(item: RowTensor, *, merge: bool) -> Any:
    """Return a `DenseGradient` or a `SparseGradient`, which have the same methods.

    Args:
      item: the gradient.
      merge: whether slices of the same index are summed first.
    """
    if not hasattr(item.tensor, "dense_shape"):
        return DenseGradient(item.tensor, item.shape)
    if not can_stay_sparse(item.rows.units, item.shape):
        return DenseGradient(to_dense(item.tensor), item.shape)
    gradient = SparseGradient(item.tensor, item.shape)
    return gradient.merge() if merge else gradient
