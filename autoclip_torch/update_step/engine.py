"""Measure and scale the changes of all parameters, on the CPU, a device or ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from autoclip_torch.gradients import device, sharded
from autoclip_torch.gradients.layout import RowNorms
from autoclip_torch.gradients.ranks import Ranks
from autoclip_torch.rows.rows import Rows

from . import cpu
from .changes import Change, batch_by_size, subtract, write_


def measure(
    rows: Rows,
    changes: dict[int, Change],
    weights: Sequence[list[Tensor]],
    states_device: torch.device | None,
    ranks: Ranks | None,
) -> list[RowNorms]:
    """Return the norms of the changes, and those of the weights if these are given.

    Args:
      rows: the rows, or their parts.
      changes: those parameters that have a gradient, by their id.
      weights: all weights before the step, as the only item, or no item.
      states_device: as in `PolicyStates.device`.
      ranks: the ranks that reduce their parts, in one reduction.
    """
    if ranks is not None:
        of_id = dict(zip(changes, subtract([*changes.values()]), strict=True))
        differences: list[Any] = [of_id.get(id(p)) for p in rows.parameters]
        return sharded.measure(rows, [differences, *weights], states_device, ranks)
    if states_device is None:
        return cpu.measure(rows, changes, weights)
    changed_rows = replace(rows, by_parameter=[each.entry for each in changes.values()])
    batches = batch_by_size(changes.values(), device.BATCH)
    lazy = chain.from_iterable(map(subtract, batches))
    first = device.measure(changed_rows, lazy, states_device)
    return [first, *[device.measure(rows, each, states_device) for each in weights]]


def scale_(changes: Iterable[Change], scales: Any) -> None:
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
