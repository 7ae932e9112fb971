"""The clippers that have taken a step, and the parameters that they know.

torch's table of the hooks of all optimizers lists them. No clipper is kept alive.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, _global_optimizer_pre_hooks

from autoclip_torch.optimizer_steps.global_hook import add_owner, list_owners
from autoclip_torch.rows.flat_parts import refuse_fsdp1


def check_coverage(clipper: Any, optimizers: Iterable[Optimizer]) -> None:
    """Compare the parameters of an `Observer` with those that are stepped.

    This is done in the first steps, and in every few later ones. Compiled steps are not
    compared.

    Args:
      clipper: it is about to clip.
      optimizers: those that step what it has clipped, as far as they are known.

    Raises:
      ValueError: FSDP1 has wrapped the parameters after the clipper was made.
    """
    coverage, parameters = clipper._coverage, clipper._parameters
    if not coverage.begin_step() or torch.compiler.is_compiling():
        return
    refuse_fsdp1(parameters.all)
    if coverage.steps == 1:
        _add_clipper(clipper)
    coverage.compare(optimizers, parameters.known, find_known)


def _add_clipper(clipper: Any) -> None:
    add_owner(_global_optimizer_pre_hooks, clipper)
    for each in _list_clippers():
        each._coverage.unclipped.add_others(clipper._parameters.known)


def _list_clippers() -> list[Any]:
    """Return each `Observer` that has taken a step."""
    return list_owners(_global_optimizer_pre_hooks)


def find_known(other_than: Any = None) -> set[int]:
    """Return the ids of the parameters of all clippers, or of all but one."""
    others = [each for each in _list_clippers() if each is not other_than]
    return {id(p) for each in others for p in each._parameters.known}


def count_sharing(clipper: Any) -> int:
    """Return how many other clippers clip parameters of an `Observer`."""
    others = [
        each._stepper.rows.parameters
        for each in _list_clippers()
        if each is not clipper
        and each._stepper.quantity == "gradient"
        and not each._stepper.dry_run
    ]
    ids = set(map(id, clipper._stepper.rows.parameters)) if others else set()
    return sum(not ids.isdisjoint(map(id, each)) for each in others)


def is_shared(clipper: Any) -> bool:
    """Return whether another clipper clips some of the parameters of an `Observer`."""
    return count_sharing(clipper) > 0
