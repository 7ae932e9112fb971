"""Other people's clippers, each with the settings that match one of ours.

They are installed as the dependency group `peers`; one that is absent is named and left
out. timm is read out of its one file: the package imports torchvision.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contenders import HISTORY, SHORT_HISTORY, Contender, Parameters


def make_peers(parameters: Parameters) -> tuple[list[Contender], list[str]]:
    """Return the peers that are installed, and the names of those that are not.

    The gradients must equal the weights, as for our own contenders.
    """
    present: list[Contender] = []
    absent: list[str] = []
    for package, make in PEERS.items():
        if importlib.util.find_spec(package) is None:
            absent.append(package)
        else:
            present.extend(make(parameters))
    return present, absent


def autoclip(parameters: Parameters) -> list[Contender]:
    """Return autoclip's quantile, per parameter and global, with full windows."""
    from autoclip.torch import QuantileClip

    peer = QuantileClip(parameters, quantile=0.9, history_length=HISTORY)
    one = QuantileClip(
        parameters, quantile=0.9, history_length=HISTORY, global_threshold=True
    )
    noise = torch.exp(0.1 * torch.randn(HISTORY, generator=torch.manual_seed(0)))
    for parameter in parameters:
        peer.state[parameter]["history"] = parameter.detach().norm() * noise
    one.state["global_history"] = _total(parameters) * noise
    return [
        _keeping("autoclip, global", one.step, one.state),
        _keeping("autoclip", peer.step, peer.state, rows=len(parameters)),
    ]


def smartclip(parameters: Parameters) -> list[Contender]:
    """Return smartclip's quantile and AGC."""
    from smartclip import AGC, AutoClip, apply

    model = torch.nn.ParameterList(parameters)
    clipper = AutoClip(
        mode="percentile",
        percentile=90.0,
        history="window",
        window_size=HISTORY,
        warmup_steps=0,
        min_history=1,
    )
    for _ in range(SHORT_HISTORY):
        apply(model, clipper)
    agc = AGC(clipping=1.0, exclude_bias_bn=False)
    return [
        _keeping("smartclip", lambda: apply(model, clipper), vars(clipper)),
        Contender("smartclip, AGC", lambda: apply(model, agc)),
    ]


def zclip(parameters: Parameters) -> list[Contender]:
    """Return ZClip without its fixed limit, after its warm-up."""
    from zclip import ZClip

    model = torch.nn.ParameterList(parameters)
    clipper = ZClip(max_grad_norm=None, warmup_steps=2)
    for _ in range(3):
        clipper.step(model)
    return [_keeping("zclip", lambda: clipper.step(model), vars(clipper))]


def timm(parameters: Parameters) -> list[Contender]:
    """Return timm's AGC."""
    package = importlib.util.find_spec("timm")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "utils" / "agc.py"
    spec = importlib.util.spec_from_file_location("timm_agc", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [
        Contender(
            "timm, AGC", lambda: module.adaptive_clip_grad(parameters, clip_factor=1.0)
        )
    ]


def pytorch_optimizer(parameters: Parameters) -> list[Contender]:
    """Return pytorch_optimizer's AGC, its result put in the gradients' place."""
    from pytorch_optimizer.optimizer.agc import agc

    @torch.no_grad()
    def step() -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(agc(parameter, parameter.grad, agc_clip_val=1.0))

    return [Contender("pytorch_optimizer, AGC", step)]


PEERS: dict[str, Callable[[Parameters], list[Contender]]] = {
    "autoclip": autoclip,
    "smartclip": smartclip,
    "zclip": zclip,
    "timm": timm,
    "pytorch_optimizer": pytorch_optimizer,
}


def _total(parameters: Parameters) -> torch.Tensor:
    return torch.nn.utils.get_total_norm(parameters).detach()


def _keeping(
    name: str, step: Callable[[], Any], state: dict[Any, Any], rows: int = 1
) -> Contender:
    """Return a contender whose state, a dictionary, is put back before each step."""
    saved = {key: copy.deepcopy(value) for key, value in state.items()}

    def restore() -> None:
        state.update({key: copy.deepcopy(value) for key, value in saved.items()})

    return Contender(name, step, restore, rows)
