"""What a run must not do unnoticed: not be finite, skip for ever, hide an overflow."""

import warnings
from typing import Any

import torch

from autoclip_core import Decision
from autoclip_core.checks import check_count, message
from autoclip_core.metrics import Tally
from autoclip_core.scale import as_norms

from .learner import Learner

_MANY = 10
"""A calibrating GradScaler halves its scale as often at most."""


def refuse_nonfinite(learner: Learner, norms: Any, observed: Any) -> None:
    """Raise a FloatingPointError that names the rows whose norm is not finite."""
    _check_not_compiling('nonfinite="raise"')
    xp, rows = learner.xp, learner.rows.names
    bad = (observed & ~xp.isfinite(as_norms(norms, xp))).tolist()
    names = [name for name, is_bad in zip(rows, bad, strict=True) if is_bad]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FloatingPointError(
            f"the gradient norm of {', '.join(names[:3])}{more} is not finite and "
            'nonfinite="raise"; to go on without such gradients, set '
            'nonfinite="zero" or "skip"'
        )


def is_skipped(learner: Learner, decision: Decision) -> bool:
    """Tell on the host whether the update is cancelled."""
    _check_not_compiling("what cancels updates")
    return bool(learner.xp.any(decision.skipped))


def _check_not_compiling(what: str) -> None:
    """Refuse what looks at a value: while it is traced, code has none."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{what} must look at the norms on the host, which a compiled step cannot; "
            'set nonfinite="zero" or "propagate", or call clipper.step() outside of '
            "torch.compile"
        )


def check_max_skips(most: int | None, may_skip: bool) -> None:
    """Refuse a limit on skipped updates where nothing skips one."""
    if most is None:
        return
    check_count("max_consecutive_skips", most, 1)
    if not may_skip:
        rule = 'given with nonfinite="skip" or with Drop(action="skip")'
        way_out = "nothing else cancels an update; leave it out"
        raise ValueError(message("max_consecutive_skips", rule, most, way_out))


def check_tally(tally: Tally, most_skips: int | None) -> None:
    """Stop a run that only skips."""
    if most_skips is not None and tally.skipped_in_a_row > most_skips:
        raise RuntimeError(
            f"{int(tally.skipped_in_a_row)} updates in a row were skipped, more than "
            f"max_consecutive_skips={most_skips}: the run is not training; "
            "look at the loss and the learning rate"
        )


def warn_of_overflows(decision: Decision, so_far: int) -> int:
    """Return how many steps in a row were not finite; warn of the tenth."""
    in_a_row = 0 if decision.finite.all() else so_far + 1
    if in_a_row == _MANY:
        warnings.warn(
            f"the gradients of the last {_MANY} steps were not finite; with a "
            "GradScaler, call step(scaler=scaler, optimizer=optimizer) or unscale_ "
            "before it, else its scale never falls; without one, look at the loss",
            stacklevel=4,
        )
    return in_a_row
