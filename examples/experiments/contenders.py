"""What the benchmark compares: clipping rules as they are installed on an optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoclip_core import (
    EmaRatio,
    Fixed,
    MeanStd,
    ParamRatio,
    Quantile,
    StreamingQuantile,
    ZScore,
)
from autoclip_torch import Clipper, TrustClip, UpdateClipper
from autoclip_torch.optim import LARC
from lamb import LAMB


@dataclass(frozen=True)
class Contender:
    """A rule, and the function that installs it and returns the optimizer to step."""

    install: Callable[[nn.Module, torch.optim.Optimizer], Any]
    optimizers: tuple[str, ...] = ("SGD", "SGD, momentum 0.9", "AdamW")
    """Where it runs."""


def clip_gradient(policy: Any, scope: str) -> Contender:
    """Return the contender that clips the gradient before the step."""

    def install(model: nn.Module, optimizer: Any) -> Any:
        Clipper(model, policy, scope=scope).attach(optimizer)
        return optimizer

    return Contender(install)


def clip_update(policy: Any, scope: str, norm: str) -> Contender:
    """Return the contender that clips the change of the weights."""

    def install(model: nn.Module, optimizer: Any) -> Any:
        UpdateClipper(model, optimizer, policy, scope=scope, norm=norm)
        return optimizer

    return Contender(install)


def clip_both(quantile: float, ratio: float, floor: float) -> Contender:
    """Return TrustClip with settings, of which the floor is no keyword."""

    def install(model: nn.Module, optimizer: Any) -> Any:
        Clipper(model, Quantile(quantile), scope="global").attach(optimizer)
        bound = ParamRatio(ratio, eps=floor)
        UpdateClipper(model, optimizer, bound, scope="parameter", norm="rms")
        return optimizer

    return Contender(install)


def trust_clip(model: nn.Module, optimizer: Any) -> Any:
    """Install TrustClip without an argument."""
    TrustClip(model, optimizer)
    return optimizer


def replace_by_lamb(model: nn.Module, optimizer: Any) -> LAMB:
    """Return LAMB at the optimizer's rate."""
    return LAMB(model.parameters(), lr=optimizer.param_groups[0]["lr"])


CONSTANTS = {
    f"constant {c:g}": clip_gradient(Fixed(c), "global")
    for c in (0.01, 0.1, 1.0, 10.0, 100.0)
}
"""The oracle is the best of them, and no clipping, in each cell."""

NO_CLIPPING = "no clipping"

CONTENDERS: dict[str, Contender] = {
    NO_CLIPPING: Contender(lambda model, optimizer: optimizer),
    "TrustClip": Contender(trust_clip),
    **CONSTANTS,
    "update bound alone, ratio 0.02, floor 0.03": clip_update(
        ParamRatio(0.02, eps=0.03), "parameter", "rms"
    ),
    "quantile 0.9": clip_gradient(Quantile(0.9), "global"),
    "TrustClip, quantile 0.5, ratio 0.02, floor 0.03": clip_both(0.5, 0.02, 0.03),
    "TrustClip, ratio 0.05, floor 0.03": clip_both(0.9, 0.05, 0.03),
    "TrustClip, floor 0.03": clip_both(0.9, 0.01, 0.03),
    "TrustClip, floor 0.1": clip_both(0.9, 0.01, 0.1),
    "TrustClip, ratio 0.02, floor 0.1": clip_both(0.9, 0.02, 0.1),
    "TrustClip, ratio 0.02, floor 0.03": clip_both(0.9, 0.02, 0.03),
    "ZClip": clip_gradient(ZScore(2.5), "global"),
    "LARC 0.02": Contender(lambda model, optimizer: LARC(optimizer, 0.02)),
    "AutoClip p = 10": clip_gradient(
        Quantile(0.1, history_length=None, include_current=True), "global"
    ),
    "AdaGC": clip_gradient(EmaRatio(1.05), "parameter"),
    "AGC 0.01": clip_gradient(ParamRatio(0.01), "unit"),
    "LAMB": Contender(replace_by_lamb, ("AdamW",)),
    "quantile 0.5": clip_gradient(Quantile(0.5), "global"),
    "TrustClip, quantile 0.1, ratio 0.02, floor 0.03": clip_both(0.1, 0.02, 0.03),
    "TrustClip, quantile 0.5, ratio 0.05, floor 0.03": clip_both(0.5, 0.05, 0.03),
    "TrustClip, quantile 0.5, ratio 0.02, floor 0.1": clip_both(0.5, 0.02, 0.1),
    "quantile 0.1": clip_gradient(Quantile(0.1), "global"),
    "update mean + 3 std": clip_update(
        MeanStd(3.0, history_length=128), "global", "l2"
    ),
    "quantile 0.9 per parameter": clip_gradient(Quantile(0.9), "parameter"),
    "mean + 2 std per parameter": clip_gradient(MeanStd(2.0), "parameter"),
    "streaming 0.9 per parameter": clip_gradient(StreamingQuantile(0.9), "parameter"),
    "AGC 0.16": clip_gradient(ParamRatio(0.16), "unit"),
}
"""In the order in which they run; the defaults of the policies are those of the API."""
