"""On an accelerator nothing is read back: everything is decided where it lies.

What shares a norm is measured and scaled in a few launches, however many tensors it is:

| bytes a number of float32 takes | measured | made 0, if it is to go | scaled   |
|---------------------------------|----------|------------------------|----------|
| alone or with others            | 4        | 4 + 4                  | 4 + 4    |
| in units                        | 4 + 8 + 8| 4 + 4                  | 4 + 4    |

What is to go is made 0 apart from the product, since 0 * inf is NaN. Units are widened
to float64 first, as a copy; what has one norm is widened where it is added up.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autoclip_torch.rows.rows import ParameterRows, Rows

from .layout import (
    norm_over,
    norms_in,
    real,
    select_,
    unit_scales,
    with_an_axis,
    writable,
)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def wide_type(device: torch.device) -> torch.dtype:
    """Return the type in which squares are added up on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def norms(rows: Rows, tensors: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return on the device the norm of each row, and which rows have one.

    Squares are summed in float64, so that neither large nor small finite gradients lose
    their norm; on a device without float64, in float32.
    """
    wide = wide_type(device)
    absent = torch.zeros((), dtype=wide, device=device)
    yes = torch.ones((), dtype=torch.bool, device=device)
    # Slots stand in the order of their rows, and so do the keys.
    vectors: dict[int, list[Tensor]] = {entry.start: [] for entry in rows.by_parameter}
    widths = {entry.start: entry.stop - entry.start for entry in rows.by_parameter}
    for entry, own in slot_norms(rows, tensors, wide):
        vectors[entry.start].append(own.to(device, non_blocking=True))
    found = [
        combined(parts) if parts else absent.expand(widths[start])
        for start, parts in vectors.items()
    ]
    observed = [
        (yes if parts else ~yes).expand(widths[start])
        for start, parts in vectors.items()
    ]
    return torch.cat(found), torch.cat(observed)


def slot_norms(
    rows: Rows, tensors: Any, wide: torch.dtype
) -> Iterator[tuple[ParameterRows, Tensor]]:
    """Yield each entry that has a tensor, and the norms of its rows there."""
    whole: list[tuple[ParameterRows, Tensor]] = []
    for entry, tensor in zip(rows.by_parameter, tensors, strict=True):
        if tensor is None or entry.start == entry.stop:
            continue
        if entry.units is None:
            whole.append((entry, tensor))
        else:
            yield entry, norms_in(tensor, entry.units, wide).reshape(-1)
    found = whole_norms([tensor for _, tensor in whole], wide)
    for (entry, _), norm in zip(whole, found, strict=True):
        yield entry, norm.reshape(1)


def whole_norms(tensors: list[Tensor], wide: torch.dtype) -> list[Tensor]:
    """Return the norm of each tensor, those of one kind measured in one call."""
    values = [real(t.coalesce() if t.is_sparse else t) for t in tensors]
    found = values.copy()
    for places in _alike(values):
        some = [values[place] for place in places]
        dtype = torch.promote_types(wide, some[0].dtype)
        norms = torch._foreach_norm(some, 2, dtype)
        for place, norm in zip(places, norms, strict=True):
            found[place] = norm
    return found


def combined(norms: list[Tensor]) -> Tensor:
    """Return the norm of a row that holds several tensors."""
    if len(norms) == 1:
        return norms[0]
    return norm_over(torch.stack(norms), (0,), norms[0].dtype)


def scale_(rows: Rows, gradients: Any, scales: Tensor) -> None:
    """Scale in place without reading a value back."""
    whole: dict[int, list[Tensor]] = {}
    for entry, gradient in zip(rows.by_parameter, gradients, strict=True):
        if gradient is None:
            continue
        gradient = writable(entry, gradient)
        if entry.units is None:
            whole.setdefault(entry.start, []).append(gradient)
        else:
            own = scales[entry.start : entry.stop].to(gradient.device)
            select_(*unit_scales(gradient, own, entry.units))
    scale_whole_(whole, scales)


def scale_whole_(gradients: dict[int, list[Tensor]], scales: Tensor) -> None:
    """Scale in place what lies in some rows, all of a row by the same number."""
    gone = scales == 0
    kept = {size: (~gone).to(integer) for size, integer in _INTEGERS.items()}
    factors = scales.masked_fill(gone, 1.0)
    for row, tensors in gradients.items():
        values = [real(tensor) for tensor in tensors]
        for places in _alike(values):
            some = [values[place] for place in places]
            there = some[0].device
            # Compiled code makes one pass of it all. A negated view has no integers.
            if torch.compiler.is_compiling() or any(one.is_neg() for one in some):
                for one in some:
                    select_(with_an_axis(one), scales[row].to(there).reshape(1))
            else:
                _keep_(some, kept[some[0].dtype.itemsize][row].to(there))
                _multiply_(some, factors[row].to(there))


def _keep_(values: list[Tensor], one_or_zero: Tensor) -> None:
    """Keep all numbers as they are, or set them to 0, in a few launches.

    Multiplied as an integer, NaN becomes 0 too, and keeps its bits if it is to stay.
    """
    torch._foreach_mul_([one.view(one_or_zero.dtype) for one in values], one_or_zero)


def _multiply_(values: list[Tensor], factor: Tensor) -> None:
    """Scale in a few launches; half precision one by one, so as not to round first."""
    if values[0].dtype.itemsize >= 4:
        torch._foreach_mul_(values, factor)
    else:
        for one in values:
            with_an_axis(one).mul_(factor.reshape(1))


def _alike(tensors: list[Tensor]) -> list[list[int]]:
    """Return the places of tensors of one type on one device, together."""
    kinds: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(place)
    return list(kinds.values())
