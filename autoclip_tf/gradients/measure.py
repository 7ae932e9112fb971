"""Measure the rows of gradients or variables; `scale_only` cuts them in two parts."""

from collections.abc import Sequence
from typing import Any

from keras import ops

from autoclip_core.clipper.parts import join_observed

from .parts import Part, count_elements, find_observed, measure_norms
from .rows import Rows

Tensor = Any


def measure_parts(parts: Sequence[Part], rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Return the norms of the parts of all rows, and their sizes if joining needs them.

    Without `scale_only`, a row is its only part.
    """
    norms = measure_norms(parts, rows.part_count, rows.norm)
    if not rows.is_split or rows.norm != "rms":
        return norms, None
    return norms, count_elements(parts, rows.part_count)


def measure_rows(parts: Sequence[Part], rows: Rows) -> Tensor:
    """Return the norm of each row."""
    return rows.join(*measure_parts(parts, rows))


def find_observed_rows(parts: Sequence[Part], rows: Rows) -> Tensor:
    """Return which rows have a gradient."""
    observed = find_observed(parts, rows.part_count)
    return ops.convert_to_tensor(join_observed(observed) if rows.is_split else observed)
