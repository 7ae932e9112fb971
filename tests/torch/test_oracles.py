"""Clippers against implementations that are not ours, on finite series, step by step.

| peer | is compared as | not compared, since it is wrong |
|---|---|---|
| torch.nn.utils | it is | |
| autoclip 0.2.1 | QuantileClip | StandardClip, which leaves out the mean |
| zclip 1.0.0 | max_grad_norm=None | clip_factor; all that is not finite |
| timm 1.0.31 | AGC of (outputs, ...) | transposed kernels: outputs are not first |
| pytorch_optimizer 4.1.0 | AGC; AdaGC of one parameter | AGC of three axes |

All of these divide by the norm plus 1e-6 or by at least 1e-6; the gradients here have
norms of 1 and more, and the tolerances cover it.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from autoclip_torch import AGC, AdaGC, NormClip, QuantileClip, ZClip

STEPS = 150
SHAPES = [(3, 4), (3,), (2, 3, 2)]


def make_parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(shapes=SHAPES, steps=STEPS, level=100.0):
    """Yield gradients with norms around `level`: heavy tails, spikes, a level shift."""
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        sizes = level * torch.exp(0.4 * torch.randn(len(shapes), generator=generator))
        if torch.rand((), generator=generator) < 0.05:
            sizes = 20 * sizes
        if step > 2 * steps // 3:
            sizes = 1.3 * sizes
        directions = [torch.randn(shape, generator=generator) for shape in shapes]
        yield [
            size * direction / direction.norm()
            for size, direction in zip(sizes, directions, strict=True)
        ]


def compare(ours, clip, peers, given, rtol=3e-6):
    """Take each step with both; return the clipped fraction of all rows.

    Args:
      ours: our clipper, and its parameters.
      clip: takes the peer's step.
      peers: the peer's parameters.
      given: lists of gradients.
    """
    clipper, parameters = ours
    clipped = []
    for grads in given:
        for one, other, gradient in zip(parameters, peers, grads, strict=True):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        clipped.append(clipper.step().clipped.float().mean())
        clip()
        for one, other in zip(parameters, peers, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=rtol, atol=0)
    return float(torch.stack(clipped).mean())


def test_a_norm_per_parameter_is_that_of_torch():
    """scope="parameter" equals `clip_grad_norm_` of each parameter."""
    ours, peers = make_parameters(), make_parameters()

    def clip():
        for parameter in peers:
            nn.utils.clip_grad_norm_(parameter, 120.0)

    clipper = NormClip(ours, max_norm=120.0, scope="parameter")
    assert 0.2 < compare((clipper, ours), clip, peers, gradients()) < 0.8


def test_the_global_norm_is_that_of_torch():
    ours = make_parameters()
    clipper = NormClip(ours, max_norm=1.0)
    for grads in gradients():
        for parameter, gradient in zip(ours, grads, strict=True):
            parameter.grad = gradient
        total = nn.utils.get_total_norm(grads)
        torch.testing.assert_close(clipper.step().norm, total.reshape(1))


@pytest.mark.needs("peers")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("quantile", "length"), [(0.9, 1000), (0.5, 20), (0.1, 7)])
def test_a_quantile_is_that_of_autoclip(quantile, length, together):
    """Its `global_threshold` is our `global_clipping`; the other names are equal."""
    from autoclip.torch import QuantileClip as Peer

    ours, peers = make_parameters(), make_parameters()
    settings = {"quantile": quantile, "history_length": length}
    peer = Peer(peers, **settings, global_threshold=together)
    clipper = QuantileClip(ours, **settings, global_clipping=together)
    rate = compare((clipper, ours), peer.step, peers, gradients())
    assert 0.05 < rate < 1


@pytest.mark.needs("peers")
def test_a_training_is_that_of_autoclip():
    """Adam in its optimizer and Adam in ours end with the same weights."""
    from autoclip.torch import QuantileClip as Peer

    ours, peers = make_parameters(), make_parameters()
    settings = {"quantile": 0.6, "history_length": 10}
    peer = Peer.as_optimizer(torch.optim.Adam(peers, lr=0.01), **settings)
    wrapped = QuantileClip.as_optimizer(torch.optim.Adam(ours, lr=0.01), **settings)
    for grads in gradients():
        for one, other, gradient in zip(ours, peers, grads, strict=True):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        wrapped.step()
        peer.step()
    for one, other, start in zip(ours, peers, make_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert (one - start).abs().max() > 0.1


ZCLIPS = {
    "reciprocal": {"mode": "zscore", "clip_option": "adaptive_scaling"},
    "mean": {"mode": "zscore", "clip_option": "mean"},
    "threshold": {"mode": "percentile"},
}
"""Our target, and its name in zclip; "percentile" is mean + z deviations."""


@pytest.mark.needs("peers")
@pytest.mark.parametrize("target", ZCLIPS)
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(("z", "alpha"), [(2.5, 0.97), (1.0, 0.8)])
def test_a_z_score_is_that_of_zclip(z, alpha, target, skips):
    """Its `z_thresh` is our `z`. It records the applied norm, or none if it skips.

    Its default `max_grad_norm` of 1.0 would clip everything, so it is None here.
    """
    from zclip import ZClip as Peer

    ours, peers = make_parameters(), make_parameters()
    peer = Peer(
        z_thresh=z,
        alpha=alpha,
        max_grad_norm=None,
        skip_update_on_spike=skips,
        **ZCLIPS[target],
    )
    record = "none" if skips else "applied"
    clipper = ZClip(ours, z=z, alpha=alpha, target=target, record=record)
    model = nn.ParameterList(peers)
    rate = compare(
        (clipper, ours), lambda: peer.step(model), peers, gradients(), rtol=2e-5
    )
    assert rate > 0.03


def timm_agc():
    """Load timm's function from its file: the package imports torchvision."""
    spec = importlib.util.find_spec("timm")
    path = Path(spec.submodule_search_locations[0]) / "utils" / "agc.py"
    spec = importlib.util.spec_from_file_location("timm_agc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def clip(parameters, clipping, eps):
        module.adaptive_clip_grad(parameters, clip_factor=clipping, eps=eps)

    return clip


def pytorch_optimizer_agc():
    from pytorch_optimizer.optimizer.agc import agc

    def clip(parameters, clipping, eps):
        for p in parameters:
            p.grad = agc(p.detach(), p.grad, agc_eps=eps, agc_clip_val=clipping)

    return clip


@pytest.mark.needs("peers")
@pytest.mark.parametrize(
    ("peer", "shapes"),
    [
        (timm_agc, [(5, 4), (6,), (), (3, 2, 5), (4, 3, 3, 2), (2, 3, 2, 2, 2)]),
        (pytorch_optimizer_agc, [(5, 4), (6,), (), (4, 3, 3, 2), (2, 3, 2, 2, 2)]),
    ],
)
@pytest.mark.parametrize("clipping", [0.5, 5.0])
def test_units_are_those_of_other_agcs(peer, shapes, clipping):
    """`clip_factor` and `agc_clip_val` are our `clipping`, `agc_eps` is our `eps`.

    The weights' first row is zero, so `eps` limits it. A vector is one unit.
    """
    ours, peers = make_parameters(shapes), make_parameters(shapes)
    with torch.no_grad():
        ours[0][0] = peers[0][0] = 0
    clip = peer()
    clipper = AGC(ours, clipping=clipping, eps=0.2)
    rate = compare(
        (clipper, ours),
        lambda: clip(peers, clipping, 0.2),
        peers,
        gradients(shapes, steps=40, level=6.0),
    )
    assert 0.05 < rate < 1


# No optimizer steps the parameters of ours: only the gradients are compared.
@pytest.mark.filterwarnings("ignore:clipper.step.. has no effect:UserWarning")
@pytest.mark.needs("peers")
@pytest.mark.parametrize("warmup", [1, 8, 40])
@pytest.mark.parametrize(("ratio", "beta"), [(1.05, 0.98), (2.0, 0.7)])
def test_adagc_is_that_of_pytorch_optimizer(ratio, beta, warmup):
    """Its `lambda_rel` is our `ratio`, `lambda_abs` our `warmup_threshold`.

    Its `warmup_steps` count one step more. Its warm-up clips the norm of all
    parameters, ours that of each; for one parameter both are equal. With
    betas=(0, ...), Adam's average is the clipped gradient.
    """
    from pytorch_optimizer import AdaGC as Peer

    (ours,), (peers,) = make_parameters([(3, 4)]), make_parameters([(3, 4)])
    peer = Peer(
        [peers],
        betas=(0.0, 0.999),
        beta=beta,
        lambda_abs=80.0,
        lambda_rel=ratio,
        warmup_steps=warmup + 1,
        weight_decay=0.0,
    )
    clipper = AdaGC(
        [ours], ratio=ratio, beta=beta, warmup_steps=warmup, warmup_threshold=80.0
    )

    def clip():
        peer.step()
        peers.grad = peer.state[peers]["exp_avg"]

    rate = compare((clipper, [ours]), clip, [peers], gradients([(3, 4)]), rtol=2e-5)
    assert rate > 0.03
