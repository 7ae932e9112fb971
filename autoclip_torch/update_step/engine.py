"""Measure and scale the changes of all parameters, on the CPU, a device or ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoclip_torch.gradients import device, sharded
from autoclip_torch.gradients.layout import RowNorms
from autoclip_torch.gradients.ranks import Ranks
from autoclip_torch.rows.rows import Rows

from . import cpu
from .changes import Change, subtract, subtract_in_batches, write_


def measure(
    rows: Rows,
    changes: list[Change],
    weights: Sequence[list[Tensor]],
    states_device: torch.device | None,
    ranks: Ranks | None,
) -> list[RowNorms]:
    """Return the norms of the changes, and those of the weights if these are given.

    Args:
      rows: the rows, or their parts.
      changes: those parameters that have a gradient.
      weights: all weights before the step, as the only item, or no item.
      states_device: as in `PolicyStates.device`.
      ranks: the ranks that reduce their parts, in one reduction.
    """
    if ranks is not None:
        pairs = zip(changes, subtract(changes), strict=True)
        of_entry = {id(change.entry): difference for change, difference in pairs}
        differences: list[Any] = [
            of_entry.get(id(entry)) for entry in rows.by_parameter
        ]
        return sharded.measure(rows, [differences, *weights], states_device, ranks)
    if states_device is None:
        return cpu.measure(rows, changes, weights)
    changed_rows = replace(rows, by_parameter=[change.entry for change in changes])
    lazy = subtract_in_batches(changes, device.BATCH)
    first = device.measure(changed_rows, lazy, states_device)
    return [first, *[device.measure(rows, each, states_device) for each in weights]]


def scale_(changes: list[Change], scales: Any) -> None:
    """Write the scaled changes. On the CPU, rows with scale 1 are not written.

    Args:
      changes: those parameters that have a gradient.
      scales: one per row, a NumPy array or a tensor on a device.
    """
    if isinstance(scales, Tensor):
        for change in changes:
            write_(change, scales[change.entry.start : change.entry.stop])
        return
    cpu.scale_(changes, scales)
