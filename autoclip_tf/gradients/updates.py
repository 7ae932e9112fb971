"""The change of variables in one step, measured like gradients, and scaled back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from .dense import Tensor, widen
from .row_tensor import RowTensor, take_rows
from .rows import Rows, stable_id


class Update(NamedTuple):
    """One variable that a step changed."""

    place: int
    """Its index among the variables of the step."""
    change: RowTensor
    """Its rows, and the new value minus the old one, in float32 or wider."""


def find_updates(
    variables: Sequence[Any],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    rows: Rows,
) -> list[Update]:
    """Return the changes of the variables that are not excluded.

    The change of a variable with a sparse gradient is dense, because an optimizer with
    momentum also changes the slices without a gradient.
    """
    updates = []
    for place, variable in enumerate(variables):
        variable_rows = rows.find_rows(variable)
        if variable_rows is not None:
            change = widen(after[place]) - widen(before[place])
            item = RowTensor(variable_rows, change, tuple(variable.shape))
            updates.append(Update(place, item))
    return updates


def list_old_values(
    variables: Sequence[Any], before: Sequence[Tensor], rows: Rows
) -> list[RowTensor]:
    """Return the variables of all rows as they were before the step.

    Args:
      variables: those that the step changed; the others still have their old value.
      before: their values before the step.
      rows: the rows.
    """
    old = dict(zip(map(stable_id, variables), before, strict=True))
    return [
        RowTensor(
            variable_rows,
            ops.convert_to_tensor(old.get(stable_id(variable), variable)),
            tuple(variable.shape),
        )
        for variable, variable_rows in rows.clipped_variables()
    ]


def scale_updates(
    updates: Sequence[Update],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    scales: Tensor,
) -> list[Tensor]:
    """Return the values after the step, moved back where a scale is not 1.

    A row whose scale is 1 has its new value bit for bit, and a row whose scale is 0 its
    old value. In most steps no row is scaled; then nothing is computed.
    """

    def scaled() -> list[Tensor]:
        values = list(after)
        for place, change in updates:
            values[place] = _scale(change, before[place], after[place], scales)
        return values

    return list(ops.cond(ops.any(scales != 1), scaled, lambda: list(after)))


def _scale(change: RowTensor, before: Tensor, after: Tensor, scales: Tensor) -> Tensor:
    """Return before + scale * (after - before)."""
    scale = take_rows(scales, change)
    factor = ops.cast(scale, change.tensor.dtype)
    moved = ops.cast(widen(before) + factor * change.tensor, after.dtype)
    return ops.where(scale == 1, after, ops.where(scale == 0, before, moved))
