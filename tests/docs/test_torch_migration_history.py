"""Clippers with a history in PyTorch; test_migration.py lists the rows.

Most peers keep a NaN and are broken afterwards. So a gradient that is not finite goes
to our clipper alone, which must decide afterwards as if that step did not exist.
"""

import math

import numpy as np
import pytest
import torch

from autoclip_torch import AdaGC, NormClip, QuantileClip, StandardClip, ZClip

from ..support import other_rules
from ..support.other_rules import series
from ..support.torch_series import (
    compare,
    finite,
    follow,
    gradients,
    make_pair,
    make_parameters,
    set_gradients,
)


def global_norm(parameters):
    return float(torch.stack([p.grad.norm() for p in parameters]).norm())


def test_a_percentile_is_that_of_the_paper():
    ours, theirs = make_pair()
    rule = other_rules.autoclip_paper(finite(series()), 10.0)
    clipper = QuantileClip(
        ours,
        quantile=0.1,
        history_length=None,
        include_current=True,
        global_clipping=True,
    )
    clip = follow(rule, theirs)
    compare(clipper, ours, clip, theirs, gradients(series()))


def test_each_parameter_has_an_entry_of_bitsandbytes():
    """From the 100th finite norm on, each parameter follows the rule on its own."""
    norms = series(rows=3)
    ours = make_parameters()
    clipper = QuantileClip(
        ours, quantile=5 / 99, history_length=100, include_current=True
    )
    found = []
    for grads in gradients(norms):
        set_gradients(ours, grads)
        decision = clipper.step()
        if decision.finite.all():
            found.append(torch.stack([decision.threshold, decision.scale]))
    for row, column in enumerate(norms.T):
        expected = np.array(list(other_rules.bitsandbytes(finite(column), 5)))
        rows = torch.stack(found)[99:, :, row].numpy()
        np.testing.assert_allclose(rows, expected[99:], rtol=3e-6)


@pytest.mark.needs("peers")
@pytest.mark.parametrize("together", [False, True])
def test_a_quantile_is_that_of_autoclip(together):
    from autoclip.torch import QuantileClip as Peer

    ours, theirs = make_pair()
    settings = {"quantile": 0.9, "history_length": 100}
    peer = Peer(theirs.parameters(), **settings, global_threshold=together)
    clipper = QuantileClip(ours, **settings, global_clipping=together)
    given = gradients(series(rows=None if together else 3))
    compare(clipper, ours, peer.step, theirs, given)


@pytest.mark.needs("peers")
def test_a_group_of_autoclip_has_its_own_quantile():
    from autoclip.torch import QuantileClip as Peer

    ours, theirs = make_pair()
    peer = Peer([theirs[0], theirs[1]], quantile=0.9, history_length=100)
    peer.add_param_group({"params": [theirs[2]]}, quantile=0.5)
    clipper = QuantileClip([ours[0], ours[1]], quantile=0.9, history_length=100)
    clipper.add_param_group({"params": [ours[2]], "quantile": 0.5})
    compare(clipper, ours, peer.step, theirs, gradients(series(rows=3)))


@pytest.mark.needs("peers")
@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
def test_autoclip_leaves_out_the_mean():
    """Its threshold is ours minus the mean of the window."""
    from autoclip.torch import StandardClip as Peer

    ours, theirs = make_pair()
    peer = Peer(
        theirs.parameters(), deviations=2.0, history_length=50, global_threshold=True
    )
    clipper = StandardClip(ours, 2.0, history_length=50, global_clipping=True)
    past, clipped = [], 0
    for grads in gradients(series()):
        set_gradients(ours, grads)
        decision = clipper.step()
        if not decision.finite:
            continue
        set_gradients(theirs, grads)
        peer.step()
        after, norm = global_norm(theirs), float(decision.norm)
        if len(past) == 1:
            assert math.isnan(after)  # the deviation of one norm
        elif past:
            threshold = float(decision.threshold) - np.mean(past[-50:])
            assert after == pytest.approx(min(norm, threshold), rel=1e-4)
            clipped += norm > threshold
        past.append(norm)
    assert clipped > 100


@pytest.mark.needs("peers")
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_a_window_is_that_of_smartclip(scope):
    """Its warm-up counts the norms of all parameters, so it is off for several."""
    import smartclip

    ours, theirs = make_pair()
    warmup = 100 if scope == "global" else 0
    records = []
    peer = smartclip.AutoClip(
        mode="percentile",
        percentile=95.0,
        history="window",
        window_size=200,
        scope="global" if scope == "global" else "per_param",
        warmup_steps=warmup,
        min_history=50 if warmup else 0,
    )
    clipper = QuantileClip(
        ours,
        quantile=0.95,
        history_length=200,
        include_current=True,
        scope=scope,
        warmup_steps=max(warmup - 1, 0),
    )
    decisions = compare(
        clipper,
        ours,
        lambda: smartclip.apply(theirs, peer, on_metrics=records.append),
        theirs,
        gradients(series(rows=None if scope == "global" else 3)),
    )
    thresholds = torch.cat([decision.threshold for decision in decisions])
    expected = torch.tensor([record["threshold"] for record in records])
    start = warmup - 1 if warmup else 0
    torch.testing.assert_close(thresholds[start:], expected[start:], rtol=3e-6, atol=0)
    assert thresholds[:start].isposinf().all()
    metrics = clipper.metrics()
    assert metrics["clip/norm"] == pytest.approx(
        math.hypot(*(r["grad_norm"] for r in records[-len(decisions[0].norm) :]))
    )


ZCLIPS = {
    "reciprocal": {"mode": "zscore", "clip_option": "adaptive_scaling"},
    "mean": {"mode": "zscore", "clip_option": "mean"},
    "threshold": {"mode": "percentile"},
}


@pytest.mark.needs("peers")
@pytest.mark.parametrize(
    ("target", "record", "bound"),
    [
        ("reciprocal", "applied", None),
        ("reciprocal", "applied", 25.0),
        ("reciprocal", "none", None),
        ("mean", "applied", None),
        ("threshold", "none", 25.0),
    ],
)
def test_a_z_score_is_that_of_zclip(target, record, bound):
    """`skip_update_on_spike` skips the update of the moments, and still clips."""
    from zclip import ZClip as Peer

    ours, theirs = make_pair()
    peer = Peer(
        alpha=0.97,
        z_thresh=2.5,
        max_grad_norm=bound,
        skip_update_on_spike=record == "none",
        **ZCLIPS[target],
    )
    clipper = ZClip(
        ours, alpha=0.97, z=2.5, target=target, record=record, max_threshold=bound
    )
    compare(
        clipper,
        ours,
        lambda: peer.step(theirs),
        theirs,
        gradients(series()),
        rtol=2e-5,
    )


def make_adagc(parameters):
    """Return AdamW with the two clippers of the page."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    return optimizer, make_warmup_and_adagc(parameters, steps=99)


def make_warmup_and_adagc(parameters, steps, ratio=1.05):
    warmup = NormClip(parameters, math.inf, warmup_steps=steps, warmup_threshold=1.0)
    clipper = AdaGC(parameters, ratio, warmup_steps=steps, warmup_threshold=math.inf)
    return warmup, clipper


@pytest.mark.parametrize(("ratio", "most"), [(1.05, 1.0), (3.0, 0.9)])
def test_the_pair_of_clippers_is_the_rule_of_the_adagc_paper(ratio, most):
    """A step that is not finite is given to ours alone, and changes nothing."""
    ours = make_parameters()
    clippers = make_warmup_and_adagc(ours, steps=100, ratio=ratio)
    norms = series(rows=3, level=0.6)
    is_finite = np.isfinite(norms).all(axis=1)
    levels, scales, rates = [], [], []
    for grads, given in zip(gradients(norms), is_finite, strict=True):
        if not given:
            grads = [torch.full_like(gradient, math.nan) for gradient in grads]
        set_gradients(ours, grads)
        first, second = [clipper.step() for clipper in clippers]
        if given:
            levels.append(second.threshold.numpy())
            scales.append((first.scale * second.scale).numpy())
            rates.append((float(first.clipped), second.clipped.float().mean()))
    rule = list(other_rules.adagc(norms[is_finite].astype(float).tolist(), ratio))
    expected_levels, expected_scales = map(np.array, zip(*rule, strict=True))
    np.testing.assert_allclose(levels, expected_levels, rtol=2e-5)
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-5)
    in_warmup, afterwards = np.mean(rates[:100], axis=0), np.mean(rates[100:], axis=0)
    assert 0.1 < in_warmup[0] < 1
    assert in_warmup[1] == afterwards[0] == 0
    assert 0.1 < afterwards[1] <= most


@pytest.mark.needs("peers")
def test_a_training_is_that_of_pytorch_optimizer():
    """The thresholds and the weights are equal after each of 500 steps."""
    from pytorch_optimizer import AdaGC as Peer

    ours, theirs = make_pair()
    peer = Peer(theirs, lr=1e-3)
    optimizer, clippers = make_adagc(ours)
    norms = series(rows=3, level=0.3)
    norms = norms[np.isfinite(norms).all(axis=1)]
    rates = []
    for step, grads in enumerate(gradients(norms)):
        gammas = [peer.state[p]["gamma"].clone() for p in theirs if step]
        set_gradients(ours, grads)
        set_gradients(theirs, grads)
        _, decision = [clipper.step() for clipper in clippers]
        optimizer.step()
        peer.step()
        if step >= 99:
            expected = 1.05 * torch.stack(gammas)
            torch.testing.assert_close(decision.threshold, expected, rtol=2e-5, atol=0)
            rates.append(decision.clipped.float().mean())
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert 0.1 < np.mean(rates) < 1
    assert (ours[0] - make_parameters()[0]).abs().max() > 0.01


@pytest.mark.needs("peers")
def test_an_idle_parameter_never_starts_there():
    from pytorch_optimizer import AdaGC as Peer

    ours, theirs = make_pair()
    peer = Peer(theirs, lr=1e-3, weight_decay=0.0)
    optimizer, clippers = make_adagc(ours)
    for clipper in clippers:
        clipper.attach(optimizer)
    for step, grads in enumerate(gradients([1.0] * 400)):
        if step < 50:
            grads[1].zero_()
        set_gradients(ours, grads)
        set_gradients(theirs, grads)
        optimizer.step()
        peer.step()
    assert float(peer.state[theirs[1]]["gamma"]) < 1e-7
    assert float(optimizer.state[ours[1]]["exp_avg"].norm()) > 1e-3
    assert float(peer.state[theirs[1]]["exp_avg"].norm()) < 1e-7
