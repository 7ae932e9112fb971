"""What is timed: each way to clip, ready to take the same step again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from autoclip_core import StreamingQuantile
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip, StandardClip, ZClip

REFERENCE, SAME = "clip_grad_norm_", "the same again"
THREADS = 2
"""Of torch, in all benchmarks."""
HISTORY = 1000
SHORT_HISTORY = 50
"""Steps seen where there is no window; a series of unit rows has to fit in memory."""

Parameters = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Contender:
    """One way to clip."""

    name: str
    step: Callable[[], Any]
    """What is timed."""
    restore: Callable[[], Any] = lambda: None
    """Restores the state from before the step; not timed."""
    rows: int = 1
    """The number of norms."""


def make_contenders(parameters: Parameters) -> list[Contender]:
    """Return all contenders; the gradients must equal the weights.

    Each limits the norms to about those of the weights: fixed thresholds are that norm,
    the others have a history of norms around it.
    """
    norm = float(torch.nn.utils.get_total_norm(parameters))
    clippers = make_clippers(parameters).items()
    return [
        Contender(REFERENCE, lambda: clip_grad_norm_(parameters, norm)),
        Contender(SAME, lambda: clip_grad_norm_(parameters, norm)),
        *(_contender(name, clipper) for name, clipper in clippers),
    ]


def make_clippers(parameters: Parameters) -> dict[str, Clipper]:
    """Return our own clippers, with full histories."""
    norm = float(torch.nn.utils.get_total_norm(parameters))
    windows: dict[str, Clipper] = {
        "QuantileClip, global": QuantileClip(
            parameters, history_length=HISTORY, scope="global"
        ),
        "QuantileClip, per parameter": QuantileClip(parameters, history_length=HISTORY),
        "StandardClip, per parameter": StandardClip(parameters, history_length=HISTORY),
    }
    averages: dict[str, Clipper] = {
        "ZClip, global": ZClip(parameters),
        "StreamingQuantile, per unit": Clipper(
            parameters, StreamingQuantile(), scope="unit"
        ),
    }
    for clipper in windows.values():
        teach(clipper, HISTORY)
    for clipper in averages.values():
        teach(clipper, SHORT_HISTORY)
    fixed: dict[str, Clipper] = {"NormClip": NormClip(parameters, max_norm=norm)}
    return fixed | windows | averages | {"AGC, per unit": AGC(parameters, clipping=1.0)}


def teach(clipper: Clipper, steps: int) -> None:
    """Record norms around those of the present gradients."""
    norms = clipper.step().norm
    clipper.reset()
    noise = torch.randn(steps, len(norms), generator=torch.Generator().manual_seed(0))
    clipper.observe(norms * torch.exp(0.1 * noise))


def reader(parameters: Parameters) -> Callable[[], float]:
    """Return the least a global norm can cost: one read of every gradient."""

    def read() -> float:
        flat = (parameter.grad.view(-1) for parameter in parameters)
        return sum(float(torch.dot(values, values)) for values in flat)

    return read


def _contender(name: str, clipper: Clipper) -> Contender:
    """Return a clipper that can return to what it has seen."""
    state, rows = clipper.state_dict(), len(clipper.names)
    return Contender(name, clipper.step, lambda: clipper.load_state_dict(state), rows)
