"""Check in the first step which plain parameters are the same on all ranks.

Parameters of a `process_group` differ from rank to rank, except those in `replicated`.
Any other copy is counted once per rank, and the norm is too large.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from autoclip_core.checks import format_error
from autoclip_torch.rows.rows import ParameterRows, Rows

from .device import get_wide_type, measure_whole
from .dtensor import is_sharded
from .layout import Gradients
from .ranks import Ranks


class Sizes(NamedTuple):
    """What is compared of a plain parameter."""

    shape: tuple[int, ...]
    is_replicated: bool | None
    weight: float
    """The norm of the parameter."""
    gradient: float | None
    """The norm of its gradient, or None without one."""


def check_first_step(
    ranks: Ranks, rows: Rows, gradients: Gradients, device: torch.device
) -> None:
    """Check once that the ranks of a process group can sum their norms.

    Every rank must call this. `gradients` is empty if they are not known.

    Raises:
      ValueError: the ranks have different numbers of rows; or `replicated` is not what
        the ranks hold. Every rank of the process group raises this.
    """
    if ranks.process_group is None or ranks.has_checked_rows:
        return
    ranks.check_rows(len(rows.names), device)
    sizes = _list_sizes(rows, gradients)
    gathered: list[Any] = [None] * dist.get_world_size(ranks.process_group)
    dist.all_gather_object(gathered, sizes, group=ranks.process_group)
    if len(gathered) > 1:
        check_replicas(gathered)


def check_replicas(gathered: list[dict[str, Sizes]]) -> None:
    """Check the plain parameters of all ranks, each under its name or its number.

    Raises:
      ValueError: a parameter in `replicated` differs between the ranks, or one outside
        of it is the same on all of them.
    """
    _check_named_replicas(gathered)
    first, *others = gathered
    unnamed = [name for name, size in first.items() if size.is_replicated is None]
    equal = [
        name
        for name in unnamed
        if first[name].gradient and all(o.get(name) == first[name] for o in others)
    ]
    if not equal:
        return
    if len(equal) == len(unnamed):  # constant gradients of a first trial look the same
        warnings.warn(
            "all parameters and their gradients are the same on all ranks of "
            "process_group, so their norm is too large if these are copies: leave "
            "process_group out; if they are not, pass replicated=()",
            stacklevel=2,
        )
        return
    rule = "the parameters that all ranks of process_group hold"
    way_out = "name the copies in replicated, as in exclude, or pass replicated=()"
    value = f"None, but {', '.join(equal[:3])} has the same gradient on all ranks"
    raise ValueError(format_error("replicated", rule, value, way_out))


def _check_named_replicas(gathered: list[dict[str, Sizes]]) -> None:
    named = [{k: s for k, s in rank.items() if s.is_replicated} for rank in gathered]
    shapes = [{name: size.shape for name, size in rank.items()} for rank in named]
    first = {*shapes[0].items()}
    if any(each != shapes[0] for each in shapes):
        rule = "the same parameters on all ranks of process_group"
        differing = {name for each in shapes for name, _ in {*each.items()} ^ first}
        way_out = "leave out what only some ranks hold"
        raise ValueError(format_error("replicated", rule, sorted(differing), way_out))
    for name in named[0]:
        norms = [rank[name].gradient for rank in named]
        if None not in norms and not all(_is_close(norm, norms[0]) for norm in norms):
            rule = "parameters with the same gradient on all ranks"
            value = {name: norms}
            way_out = "clip after the gradients are averaged, or leave it out"
            raise ValueError(format_error("replicated", rule, value, way_out))


def _is_close(norm: Any, other: Any) -> bool:
    return math.isclose(norm, other, rel_tol=1e-3) or not math.isfinite(norm + other)


def _list_sizes(rows: Rows, gradients: Gradients) -> dict[str, Sizes]:
    """Return what the ranks compare, for each plain parameter of this rank."""
    gradients = list(gradients) or [None] * len(rows.by_parameter)
    pairs = zip(rows.by_parameter, gradients, strict=True)
    return {
        entry.name or f"parameter {index}": _measure_one(entry, gradient)
        for index, (entry, gradient) in enumerate(pairs)
        if not is_sharded(entry.parameter)
    }


def _measure_one(entry: ParameterRows, gradient: Any) -> Sizes:
    tensors = [entry.parameter.detach(), *([] if gradient is None else [gradient])]
    norms = measure_whole(tensors, get_wide_type(entry.parameter.device))
    weight, gradient_norm = [*map(float, norms), None][:2]
    shape = tuple(entry.parameter.shape)
    return Sizes(shape, entry.is_replicated, weight or 0.0, gradient_norm)
