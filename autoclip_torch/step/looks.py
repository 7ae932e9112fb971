"""What has to look at a norm on the host, and cannot while code is traced."""

from typing import Any

import torch

from autoclip_core import Decision
from autoclip_core.scale import as_norms
from autoclip_torch.state.policy_states import PolicyStates


def refuse_nonfinite(states: PolicyStates, norms: Any, observed: Any) -> None:
    """Raise a FloatingPointError that names the rows whose norm is not finite."""
    _check_not_compiling('nonfinite="raise"')
    xp, rows = states.xp, states.rows.names
    bad = (observed & ~xp.isfinite(as_norms(norms, xp))).tolist()
    names = [name for name, is_bad in zip(rows, bad, strict=True) if is_bad]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FloatingPointError(
            f"the gradient norm of {', '.join(names[:3])}{more} is not finite and "
            'nonfinite="raise"; to go on without such gradients, set '
            'nonfinite="zero" or "skip"'
        )


def is_skipped(decision: Decision) -> bool:
    """Tell on the host whether the update is cancelled."""
    _check_not_compiling("what cancels updates")
    return bool(torch.as_tensor(decision.skipped).any())


def _check_not_compiling(what: str) -> None:
    """Refuse what looks at a value: while it is traced, code has none."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{what} must look at the norms on the host, which a compiled step cannot; "
            'set nonfinite="zero" or "propagate", or call clipper.step() outside of '
            "torch.compile"
        )
