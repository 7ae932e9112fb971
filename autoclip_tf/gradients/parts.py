"""One gradient, or variable, with its rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from autoclip_core.clipper.units import ParameterRows, row_size, unit_shape

from .dense import DenseGradient, Tensor
from .sparse import SparseGradient, can_stay_sparse, to_dense


class Part(NamedTuple):
    """One gradient, or variable, and its rows."""

    rows: ParameterRows
    tensor: Tensor
    """A dense tensor, or TensorFlow's `IndexedSlices`."""
    shape: tuple[int, ...]
    """The shape of the variable."""


def count_elements(parts: Sequence[Part], row_count: int) -> Tensor:
    """Return the number of elements of each row; a sparse gradient counts whole."""
    sizes = np.zeros((row_count,), np.float32)
    for rows, _, shape in parts:
        sizes[rows.start : rows.stop] += row_size(shape, rows)
    return ops.convert_to_tensor(sizes)


def find_observed(parts: Sequence[Part], row_count: int) -> np.ndarray[Any, Any]:
    """Return which rows have a gradient; this is known when a step is traced."""
    has_gradient = np.zeros((row_count,), bool)
    for rows, *_ in parts:
        has_gradient[rows.start : rows.stop] = True
    return has_gradient


def select_part(by_row: Tensor, part: Part) -> Tensor:
    """Return a part's entries of a number per row, to broadcast with the variable."""
    units = part.rows.units
    shape = () if units is None else unit_shape(part.shape, units)
    return ops.reshape(by_row[part.rows.start : part.rows.stop], shape)


def wrap(part: Part, *, merge: bool) -> Any:
    """Return a `DenseGradient` or a `SparseGradient`, which have the same methods.

    Args:
      part: the gradient.
      merge: whether slices of the same index are summed first.
    """
    if not hasattr(part.tensor, "dense_shape"):
        return DenseGradient(part.tensor, part.shape)
    if not can_stay_sparse(part.rows.units, part.shape):
        return DenseGradient(to_dense(part.tensor), part.shape)
    gradient = SparseGradient(part.tensor, part.shape)
    return gradient.merge() if merge else gradient
