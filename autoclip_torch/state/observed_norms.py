"""Read the norms that `observe` receives, as a series of steps."""

from typing import Any

import torch
from torch import Tensor

from autoclip_core.checks import format_error
from autoclip_torch.gradients.dtensor import is_sharded


def as_series(norms: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Return norms as a series of steps, and which of them were observed.

    Both have the shape (steps, rows). A negative norm becomes NaN. None is one step in
    which no norm was observed.
    """
    is_observed = norms is not None
    if not is_observed:
        norms = torch.zeros(rows)
    if is_sharded(norms):  # such as `clip_grad_norm_` returns under FSDP2
        norms = norms.full_tensor()
    values = torch.as_tensor(norms, dtype=torch.float64).detach()
    series = values
    if values.ndim < 2:
        series = values.reshape(-1, 1) if rows == 1 else values[None]
    if series.ndim != 2 or series.shape[1] != rows or len(series) == 0:
        step = "a number" if rows == 1 else f"of shape ({rows},)"
        rule = f"{step}, or a series of shape (steps, {rows})"
        shape = tuple(values.shape)
        error = format_error("norms", rule, shape, "clipper.names lists the rows")
        raise ValueError(error)
    series = torch.where(series < 0, float("nan"), series)
    return series, torch.full_like(series, is_observed, dtype=torch.bool)
