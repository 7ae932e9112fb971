"""What is timed: each way to clip, ready to take the same step again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from autoclip_core import StreamingQuantile
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip, StandardClip, ZClip

REFERENCE, SAME = "clip_grad_norm_", "the same again"
HISTORY = 1000
FEW = 50
"""Steps seen where there is no window; a series of unit rows has to fit in memory."""

Parameters = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Contender:
    """One way to clip."""

    name: str
    step: Callable[[], Any]
    """What is timed."""
    restore: Callable[[], Any] = lambda: None
    """Makes it forget the step; not timed."""
    rows: int = 1
    """Norms that are told apart."""
    clips: bool = True
    """False for what only reads."""


def make_contenders(parameters: Parameters) -> list[Contender]:
    """Return all contenders; the gradients must equal the weights.

    Each limits the norms to about those of the weights: fixed thresholds are that norm,
    the others have a history of norms around it.
    """
    norm = float(torch.nn.utils.get_total_norm(parameters))
    own = QuantileClip(parameters, history_length=HISTORY)
    one = QuantileClip(parameters, history_length=HISTORY, global_clipping=True)
    deviations = StandardClip(parameters, history_length=HISTORY)
    streaming = Clipper(parameters, StreamingQuantile(), scope="unit")
    return [
        Contender(REFERENCE, lambda: clip_grad_norm_(parameters, norm)),
        Contender(SAME, lambda: clip_grad_norm_(parameters, norm)),
        Contender("one read, torch.dot", reader(parameters), clips=False),
        _contender("NormClip", NormClip(parameters, max_norm=norm)),
        _contender("QuantileClip, global", one, HISTORY),
        _contender("QuantileClip", own, HISTORY),
        _contender("StandardClip", deviations, HISTORY),
        _contender("ZClip", ZClip(parameters), FEW),
        _contender("AGC, unit", AGC(parameters, clipping=1.0)),
        _contender("StreamingQuantile, unit", streaming, FEW),
    ]


def reader(parameters: Parameters) -> Callable[[], float]:
    """Return the least a global norm can cost: one read of every gradient."""

    def read() -> float:
        flat = (parameter.grad.view(-1) for parameter in parameters)
        return sum(float(torch.dot(values, values)) for values in flat)

    return read


def _contender(name: str, clipper: Clipper, steps: int = 0) -> Contender:
    """Return a clipper that has seen so many steps, and can return there."""
    norms = clipper.step().norm
    clipper.reset()
    if steps:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(steps, len(norms), generator=generator)
        clipper.observe(norms * torch.exp(0.1 * noise))
    seen = clipper.state_dict()
    return Contender(
        name, clipper.step, lambda: clipper.load_state_dict(seen), len(norms)
    )
