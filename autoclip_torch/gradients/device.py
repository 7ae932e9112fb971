"""Measure and scale on an accelerator, without reading anything back.

Tensors that share a norm are measured and scaled in a few launches, regardless of their
number. Without the kernel, torch's operations scale half-precision tensors one by one.
The table shows the bytes that are read or written for each float32 number:

| scope                      | measured  | set to 0 | scaled |
|----------------------------|-----------|----------|--------|
| one norm per tensor        | 4         | 4 + 4    | 4 + 4  |
| the same, by Triton        | 4         |          | 4 + 4  |
| units                      | 4 + 8 + 8 | 4 + 4    | 4 + 4  |

On CUDA, a Triton kernel writes only tensors whose scale is not 1. In torch's
operations, setting to 0 is a separate pass, because 0 * inf is NaN, and both passes
write every tensor. Units are copied to float64 first. Tensors with one norm are widened
while they are summed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autoclip_torch.kernels.choose import scale_by_kernel_
from autoclip_torch.rows.rows import ParameterRows, Rows

from .dtensor import align_local_scales, get_local
from .layout import (
    Gradients,
    RowNorms,
    apply_scale_,
    as_measurable,
    as_real,
    compute_norm,
    get_stored,
    get_unit_norms,
    make_writable,
    with_axis,
)

BATCH = 2**26
"""After this many elements, tensors that a generator yields are measured and freed."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def choose_device(tensors: Sequence[Tensor]) -> torch.device | None:
    """Return the device on which to decide about tensors; None is NumPy on the CPU.

    NumPy decides if all of them are plain tensors on the CPU, which it can view.
    """
    exact_types = (Tensor, torch.nn.Parameter)
    if not torch.compiler.is_compiling() and all(
        tensor.is_cpu and type(tensor) in exact_types for tensor in tensors
    ):
        return None
    accelerators = (t.device for t in tensors if t.device.type != "cpu")
    return next(accelerators, tensors[0].device)


def get_wide_type(device: torch.device) -> torch.dtype:
    """Return the type in which squares are summed on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def get_order(rows: Rows) -> float:
    """Return the order of the vector norm that measures a row."""
    return math.inf if rows.norm == "max" else 2


def measure(rows: Rows, tensors: Gradients, device: torch.device) -> RowNorms:
    """Return on the device the norm of each row, and which rows have one.

    Squares are summed in float64, so that neither large nor small finite gradients lose
    their norm; on a device without float64, in float32. An rms norm is measured as an
    l2 norm. A NaN makes a largest magnitude infinite.
    """
    wide, order = get_wide_type(device), get_order(rows)
    absent = torch.zeros((), dtype=wide, device=device)
    true = torch.ones((), dtype=torch.bool, device=device)
    vectors: dict[int, list[Tensor]] = {start: [] for start in rows.ranges}
    for entry, norms in _measure_parameters(rows, tensors, wide, order):
        vectors[entry.start].append(norms.to(device, non_blocking=True))
    norms_of_rows, observed = [], []
    for start, parts in vectors.items():
        width = rows.ranges[start]
        row_norms = combine_norms(parts, order) if parts else absent.expand(width)
        norms_of_rows.append(row_norms)
        observed.append((true if parts else ~true).expand(width))
    norms = torch.cat(norms_of_rows)
    if order != 2:
        norms = norms.masked_fill(norms.isnan(), order)
    return RowNorms(norms, torch.cat(observed))


def _measure_parameters(
    rows: Rows, tensors: Gradients, wide: torch.dtype, order: float
) -> Iterator[tuple[ParameterRows, Tensor]]:
    """Yield each parameter that has a tensor, with the norms of its rows."""
    whole: list[tuple[ParameterRows, Tensor]] = []
    size = 0
    for entry, tensor in zip(rows.by_parameter, tensors, strict=True):
        if tensor is None or entry.start == entry.stop:
            continue
        if entry.units is not None:
            unit_norms = get_unit_norms(tensor, entry.units, wide, order)
            yield entry, unit_norms.reshape(-1)
            continue
        whole.append((entry, tensor))
        size += get_stored(tensor).numel()
        if size >= BATCH:
            yield from _measure_batch(whole, wide, order)
            whole, size = [], 0
    yield from _measure_batch(whole, wide, order)


def _measure_batch(
    whole: list[tuple[ParameterRows, Tensor]], wide: torch.dtype, order: float
) -> Iterator[tuple[ParameterRows, Tensor]]:
    """Yield each parameter that is one row, or a part of one, with its norm."""
    norms = measure_whole([tensor for _, tensor in whole], wide, order)
    for (entry, _), norm in zip(whole, norms, strict=True):
        yield entry, norm.reshape(1)


def measure_whole(
    tensors: list[Tensor], wide: torch.dtype, order: float = 2
) -> list[Tensor]:
    """Return the norm of each tensor; one call measures all tensors of a type."""
    dense = [tensor.coalesce() if tensor.is_sparse else tensor for tensor in tensors]
    values = [as_measurable(tensor, order) for tensor in dense]
    norms = values.copy()
    for indices in _group_by_type(values):
        batch = [values[index] for index in indices]
        dtype = torch.promote_types(wide, batch[0].dtype)
        batch_norms = torch._foreach_norm(batch, order, dtype)
        for index, norm in zip(indices, batch_norms, strict=True):
            norms[index] = norm
    return norms


def combine_norms(norms: list[Tensor], order: float = 2) -> Tensor:
    """Return the norm of a row that holds several tensors."""
    if len(norms) == 1:
        return norms[0]
    return compute_norm(torch.stack(norms), (0,), norms[0].dtype, order)


def scale_(rows: Rows, gradients: Gradients, scales: Tensor) -> None:
    """Multiply the gradients by the scale of their row, without reading it back.

    Of a `DTensor`, each rank scales the local part.

    Args:
      rows: which gradient belongs to which row.
      gradients: one per parameter.
      scales: float32, one per row. 1 leaves a gradient unchanged bit for bit. 0 sets it
        to 0, even if it is not finite.
    """
    whole: dict[int, list[Tensor]] = {}
    for entry, gradient in zip(rows.by_parameter, gradients, strict=True):
        if gradient is None:
            continue
        gradient = make_writable(entry, gradient)
        local = get_local(gradient)
        if entry.units is None:
            whole.setdefault(entry.start, []).append(local)
        else:
            entry_scales = scales[entry.start : entry.stop].to(local.device)
            apply_scale_(*align_local_scales(gradient, entry_scales, entry.units))
    scale_whole_(whole, scales)


def scale_whole_(gradients: dict[int, list[Tensor]], scales: Tensor) -> None:
    """Scale tensors in place, given by row; one scale holds for all of a row."""
    pairs = [
        (row, as_real(tensor))
        for row, tensors in gradients.items()
        for tensor in tensors
    ]
    if not torch.compiler.is_compiling():  # torch compiles a kernel of its own
        pairs = scale_by_kernel_(pairs, scales)
    if pairs:
        _scale_by_operations_(pairs, scales)


def _scale_by_operations_(pairs: list[tuple[int, Tensor]], scales: Tensor) -> None:
    """Scale real tensors, given with their rows, by operations of torch."""
    is_zero = scales == 0
    masks = {size: (~is_zero).to(integer) for size, integer in _INTEGERS.items()}
    factors = scales.masked_fill(is_zero, 1.0)
    by_row: dict[int, list[Tensor]] = {}
    for row, tensor in pairs:
        by_row.setdefault(row, []).append(tensor)
    for row, values in by_row.items():
        for indices in _group_by_type(values):
            batch = [values[index] for index in indices]
            device = batch[0].device
            # Compiled code fuses this into one pass. A negated view has no integers.
            if torch.compiler.is_compiling() or any(v.is_neg() for v in batch):
                for tensor in batch:
                    apply_scale_(with_axis(tensor), scales[row].to(device).reshape(1))
            else:
                _mask_(batch, masks[batch[0].dtype.itemsize][row].to(device))
                _multiply_(batch, factors[row].to(device))


def _mask_(values: list[Tensor], mask: Tensor) -> None:
    """Leave all elements unchanged (mask 1) or set them to 0 (mask 0), in few launches.

    The elements are multiplied as integers: so NaN becomes 0, too, and an element that
    stays is unchanged bit for bit.
    """
    torch._foreach_mul_([value.view(mask.dtype) for value in values], mask)


def _multiply_(values: list[Tensor], factor: Tensor) -> None:
    """Scale in few launches; half precision one by one, to round only the product."""
    if values[0].dtype.itemsize >= 4:
        torch._foreach_mul_(values, factor)
    else:
        for value in values:
            with_axis(value).mul_(factor.reshape(1))


def _group_by_type(tensors: list[Tensor]) -> list[list[int]]:
    """Return the indices of the tensors, grouped by device and type."""
    kinds: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    return list(kinds.values())
