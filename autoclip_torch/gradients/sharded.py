"""Measure gradients that are distributed over ranks.

Each rank measures the local part of a `DTensor` (FSDP2, tensor parallel). One reduction
sums the squares of all rows over the ranks, or takes the largest magnitudes, so every
rank receives the same numbers and makes the same decision. A part that several ranks
hold counts once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from autoclip_torch.rows.rows import ParameterRows, Rows

from .device import combine_norms, get_order, get_wide_type, measure_whole
from .dtensor import get_local, get_local_unit_norms, is_sharded, sum_partial
from .layout import Gradients, RowNorms
from .ranks import Ranks
from .replicas import check_first_step


def measure(
    rows: Rows,
    sequences: Sequence[Gradients],
    device: torch.device | None,
    ranks: Ranks,
    overflow: Tensor | None = None,
    reason: str = "step",
) -> list[RowNorms]:
    """Return for each sequence the norm of each row, and which rows have one.

    Args:
      rows: which tensor belongs to which row.
      sequences: gradients, or gradients and parameters: one tensor per parameter.
      device: the device of the norms; None returns NumPy arrays on the CPU.
      ranks: the ranks that reduce their parts.
      overflow: not 0 if this rank's gradients overflowed. It becomes 1 if those of any
        rank did; then no rank observes the step.
      reason: as in `StepCounter.reduce`.

    Raises:
      RuntimeError: a rank left out a step.
      ValueError: the ranks cannot sum their norms, or `replicated` is wrong; both are
        found in the first step.
    """
    sum_device = torch.device("cpu") if device is None else device
    _agree_on_change(ranks, len(sequences), device)
    if not torch.compiler.is_compiling():
        gradients = sequences[0] if reason == "step" else ()
        check_first_step(ranks, rows, gradients, sum_device)
    parts = [_measure_local(rows, tensors, sum_device, ranks) for tensors in sequences]
    # All ranks send vectors of the same length, with or without a loss scale.
    flag = parts[0].new_zeros(()) if overflow is None else overflow.to(parts[0])
    vector = torch.cat([*parts, flag.reshape(1)])
    vector = ranks.reduce(vector, take_largest=rows.norm == "max", reason=reason)
    if overflow is not None:
        overflow.copy_(vector[-1] != 0)  # a fused kernel compares it with 1
    results = []
    for powers, count, *sizes in vector[:-1].view(len(sequences), -1, len(rows.names)):
        norms = powers if rows.norm == "max" else powers.sqrt()
        measured = (norms, (count > 0) & (vector[-1] == 0), *sizes)
        results.append(
            RowNorms(*(t.numpy() if device is None else t for t in measured))
        )
    return results


def _agree_on_change(ranks: Ranks, sequences: int, device: torch.device | None) -> None:
    """After a change of the number of rows, check that all ranks have changed theirs.

    A rank without the change is in a step, and sends a vector of the earlier length.

    Raises:
      RuntimeError: another rank has not changed its parameters.
    """
    if (rows := ranks.rows_before) is not None:
        ranks.rows_before = None
        compare_steps(rows, sequences, device, ranks, reason="change of parameters")
        ranks.has_checked_rows = False


def compare_steps(
    rows: Rows,
    sequences: int,
    device: torch.device | None,
    ranks: Ranks,
    *,
    reason: str = "check_agreement",
) -> None:
    """Check that all ranks have taken the same steps, without gradients.

    The reduction has the length of that of a step, so that it ends even if another rank
    is in a step.

    Args:
      rows, device, ranks: as in `measure`.
      sequences: the number of sequences that a step measures.
      reason: as in `StepCounter.reduce`.

    Raises:
      RuntimeError: a rank left out a step.
    """
    nothing = [[None] * len(rows.by_parameter)] * sequences
    measure(rows, nothing, device, ranks, reason=reason)


def _measure_local(
    rows: Rows, tensors: Gradients, device: torch.device, ranks: Ranks
) -> Tensor:
    """Return this rank's share of the norms, the rows that it observed, and sizes.

    Its share is its part of the squared norms; or the largest magnitudes, with infinity
    for NaN, because a reduction over ranks need not return NaN.
    """
    wide, order = get_wide_type(device), get_order(rows)
    height = 3 if rows.norm == "rms" else 2
    share = torch.zeros(height, len(rows.names), dtype=wide, device=device)
    powers, observed = share[:2]
    whole: dict[tuple[int, float], list[Tensor]] = {}
    for entry, tensor in zip(rows.by_parameter, tensors, strict=True):
        if tensor is None:
            continue
        tensor, span = sum_partial(tensor), slice(entry.start, entry.stop)
        weight = ranks.get_weight(tensor, entry.is_replicated)
        if rows.norm == "rms":
            share[2, span] += weight * _count_local(tensor, entry, wide).to(device)
        if entry.units is None:
            whole.setdefault((entry.start, weight), []).append(get_local(tensor))
            continue
        part = get_local_unit_norms(tensor, get_local(tensor), entry.units, wide, order)
        _join_(powers[span], part.to(device, non_blocking=True), weight, order)
        observed[span] = 1
    for (row, weight), parts in whole.items():
        norms = [part.to(device) for part in measure_whole(parts, wide, order)]
        _join_(powers[row], combine_norms(norms, order), weight, order)
        observed[row] = 1
    return share.reshape(-1)


def _join_(powers: Tensor, norms: Tensor, weight: float, order: float) -> None:
    """Add the squares of norms, or take the largest norms, in place."""
    if order == 2:
        powers += weight * norms.square()
    else:
        norms = norms.masked_fill(norms.isnan(), order)
        powers.copy_(torch.maximum(powers, norms))


def _count_local(tensor: Tensor, entry: ParameterRows, wide: torch.dtype) -> Tensor:
    """Return the number of local elements in each row of a tensor."""
    local = get_local(tensor)
    if entry.units is None:
        return torch.full((), local.numel(), dtype=wide)
    if not is_sharded(tensor):
        return torch.full((), entry.size, dtype=wide)
    ones = torch.ones_like(local)
    return get_local_unit_norms(tensor, ones, entry.units, wide, 2).square()
