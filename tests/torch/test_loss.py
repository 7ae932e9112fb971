"""Loss policies in torch: by hand, attached, wrapped, fused, with closures and scalers.

`tests/core/test_loss.py` tests the rule itself; `test_sharded.py` tests several ranks.
"""

import math

import numpy as np
import pytest
import torch

from autoclip_core import Cap, Drop, Fixed, MeanStd, Quantile, Warmup, ZScore
from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ValueClip,
    ZClip,
)
from autoclip_torch.agreement import check_agreement

from ..support.other_rules import losses_and_norms, olmo_core
from ..support.torch_device import looks_counted, nothing_read, watched

NAN, INF = math.nan, math.inf
LOSSES = MeanStd(3.0, history_length=8)


def parameter(values=(1.0, 1.0)):
    return torch.nn.Parameter(torch.tensor(values))


def test_decisions_are_those_of_olmo_core():
    """5000 random steps with losses of both signs; either rule alone skips fewer."""
    rule = Warmup(MeanStd(6.0, history_length=128), steps=63)
    weight = parameter((0.0,))
    clipper = Clipper([weight], Drop(rule, action="skip"), loss_policy=rule)
    losses, norms = losses_and_norms()
    by_loss, by_norm = olmo_core(losses), olmo_core(norms)
    skipped = []
    for loss, norm in zip(torch.tensor(losses), torch.tensor(norms), strict=True):
        weight.grad = norm.reshape(1)
        clipper.step(loss=loss)
        skipped.append(weight.grad is None)
    np.testing.assert_array_equal(skipped, by_loss | by_norm)
    assert 20 < (by_loss & ~by_norm).sum() < 200
    assert 20 < (by_norm & ~by_loss).sum() < 200
    assert clipper.metrics()["clip/loss_skipped_total"] == by_loss.sum()


# The ways to give a loss. Each returns a function that takes a step.


def by_hand(weight, make):
    optimizer = torch.optim.Adam([weight], lr=0.1)
    clipper = make([weight])

    def step(loss):
        clipper.step(loss=loss)
        optimizer.step()

    return clipper, optimizer, step


def attached(weight, make, **options):
    optimizer = torch.optim.Adam([weight], lr=0.1, **options)
    clipper = make([weight])
    clipper.attach(optimizer)

    def step(loss):
        clipper.observe_loss(loss)
        optimizer.step()

    return clipper, optimizer, step


def fused(weight, make):
    return attached(weight, make, fused=True)


def wrap(weight):
    adam = torch.optim.Adam([weight], lr=0.1)
    return Clipper.as_optimizer(adam, Quantile(0.5), loss_policy=LOSSES)


def wrapped(weight, make):
    optimizer = wrap(weight)

    def step(loss):
        optimizer.clipper.observe_loss(loss)
        optimizer.step()

    return optimizer.clipper, optimizer.optimizer, step


def with_a_closure(weight, make):
    """The loss is what the closure returns."""
    clipper, optimizer, _ = attached(weight, make)
    return clipper, optimizer, lambda loss: optimizer.step(lambda: loss)


def wrapped_with_a_closure(weight, make):
    optimizer = wrap(weight)
    step = lambda loss: optimizer.step(lambda: loss)  # noqa: E731
    return optimizer.clipper, optimizer.optimizer, step


WAYS = [by_hand, attached, fused, wrapped, with_a_closure, wrapped_with_a_closure]
every_way = pytest.mark.parametrize("way", WAYS)


def make(parameters, **keywords):
    return Clipper(parameters, Quantile(0.5), loss_policy=LOSSES, **keywords)


SERIES = [-1.0, 0.0, 1.0, 0.5, 9.0, NAN, INF, 0.5]
SKIPPED = [False, False, False, False, True, True, True, False]


@every_way
def test_a_spike_cancels_the_update(way):
    """Adam moves a weight whose gradient is 0, but not one whose update is left out."""
    weight = parameter()
    clipper, optimizer, step = way(weight, make)
    unchanged, counts = [], []
    for number, loss in enumerate(SERIES):
        before = weight.detach().clone()
        weight.grad = torch.full((2,), 1.0 + number)
        step(torch.tensor(loss) if number % 2 else loss)
        unchanged.append(torch.equal(weight, before))
        counts.append(int(clipper.state_dict()["states"][0]["count"]))
    assert unchanged == SKIPPED
    assert counts == [1, 2, 3, 4, 5, 5, 5, 6], "a finite spike records the norm"
    assert int(optimizer.state[weight]["step"]) == SKIPPED.count(False)
    metrics = clipper.metrics()
    assert metrics["clip/skipped_total"] == metrics["clip/loss_skipped_total"] == 3
    assert metrics["clip/loss"] == 0.5
    past = np.array([-1.0, 0.0, 1.0, 0.5, 9.0])
    threshold = past.mean() + 3 * past.std(ddof=1)
    assert metrics["clip/loss_threshold"] == pytest.approx(threshold, rel=1e-6)


@pytest.mark.parametrize("way", [by_hand, attached, fused, wrapped])
def test_a_step_without_its_loss_is_an_error(way):
    weight = parameter()
    clipper, optimizer, step = way(weight, make)
    weight.grad = torch.ones(2)
    step(1.0)
    before = clipper.state_dict()
    with pytest.raises(
        ValueError, match=r"loss must be given in each step .* got none"
    ):
        optimizer.step() if way in (attached, fused) else clipper.step()
    after = clipper.state_dict()
    assert torch.equal(after["tally"]["steps"], before["tally"]["steps"])
    step(1.0)


def test_a_later_loss_replaces_one_that_no_step_used():
    """A GradScaler leaves out the optimizer's step after an overflow."""
    weight = parameter()
    clipper, _, step = attached(weight, make)
    weight.grad = torch.ones(2)
    clipper.observe_loss(100.0)
    step(1.0)
    assert clipper.metrics()["clip/loss"] == 1.0


INVALID = [torch.ones(2), torch.ones(1, 1), [1.0, 2.0]]


@pytest.mark.parametrize("loss", INVALID, ids=str)
def test_a_loss_of_another_shape_is_refused(loss):
    clipper = make([parameter()])
    with pytest.raises(ValueError, match=r"of shape .*mean"):
        clipper.step(loss=loss)


@pytest.mark.parametrize("loss", ["1.0", 1 + 2j, torch.tensor(1 + 2j)], ids=str)
def test_a_loss_that_is_no_real_number_is_refused(loss):
    clipper = make([parameter()])
    with pytest.raises(TypeError, match=r"loss must be a real number, got .*mean loss"):
        clipper.step(loss=loss)


def test_a_loss_without_a_policy_is_refused():
    clipper = NormClip([parameter()], 1.0)
    for call in (clipper.observe_loss, lambda loss: clipper.step(loss=loss)):
        with pytest.raises(ValueError, match="loss must be left out without"):
            call(1.0)


@pytest.mark.parametrize("policy", [MeanStd(log=True), Quantile(history_length=None)])
def test_a_policy_of_positive_numbers_is_refused(policy):
    with pytest.raises(ValueError, match="loss_policy must be a policy that works"):
        NormClip([parameter()], 1.0, loss_policy=policy)
    with pytest.raises(TypeError, match="loss_policy must be a policy"):
        NormClip([parameter()], 1.0, loss_policy=3.0)


NAMED = {
    "NormClip": lambda p, **k: NormClip(p, 1.0, **k),
    "QuantileClip": QuantileClip,
    "StandardClip": StandardClip,
    "ZClip": ZClip,
    "AdaGC": AdaGC,
    "AGC": AGC,
    "ValueClip": lambda p, **k: ValueClip(p, 1.0, **k),
    "scale_only": lambda p, **k: NormClip(
        [("a", p[0]), ("b", p[1])], 1.0, scale_only="b", **k
    ),
    "two policies": lambda p, **k: Clipper(
        [{"params": p[:1]}, {"params": p[1:], "policy": Fixed(1.0)}], Quantile(), **k
    ),
}


@pytest.mark.parametrize("kind", NAMED.values(), ids=list(NAMED))
@pytest.mark.parametrize("loss", [9.0, NAN])
def test_every_clipper_has_a_loss_policy(kind, loss):
    first, second = parameter(), parameter()
    clipper = kind([first, second], loss_policy=Cap(LOSSES, max_norm=2.0))
    for value in (1.0, loss):
        first.grad = torch.tensor([3.0, 4.0])
        decision = clipper.step(loss=value)
    assert decision.skipped.all()
    assert (decision.scale[torch.isfinite(decision.norm)] == 0).all()
    assert first.grad is None
    assert clipper.metrics()["clip/loss_skipped_total"] == 1


def test_a_dry_run_cancels_nothing():
    weight = parameter()
    clipper = make([weight], dry_run=True)
    for loss in SERIES:
        weight.grad = torch.ones(2)
        clipper.step(loss=loss)
        assert weight.grad.tolist() == [1.0, 1.0]
    assert clipper.metrics()["clip/loss_skipped_total"] == 3


def test_endless_loss_skips_stop_a_run():
    weight = parameter()
    clipper = NormClip([weight], 1.0, loss_policy=Fixed(2.0), max_consecutive_skips=2)
    for _ in range(2):
        weight.grad = torch.ones(2)
        clipper.step(loss=5.0)
    weight.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="3 updates in a row were skipped"):
        clipper.step(loss=5.0)


def test_a_norm_that_raises_records_no_loss():
    weight = parameter()
    clipper = make([weight], nonfinite="raise")
    weight.grad = torch.tensor([NAN, 1.0])
    with pytest.raises(FloatingPointError):
        clipper.step(loss=1.0)
    assert int(clipper.state_dict()["loss"]["state"]["loss_policy"]["count"]) == 0


def test_a_loss_scale_and_a_spike():
    """The scaler steps an optimizer without gradients; the spike lowers no scale."""
    weight = parameter()
    optimizer = torch.optim.Adam([weight], lr=0.1)
    clipper = make([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weights = []
    for loss in (1.0, 0.0, 2.0, 9.0):
        optimizer.zero_grad()
        scaler.scale((weight * 3).sum()).backward()
        clipper.step(scaler=scaler, optimizer=optimizer, loss=loss)
        scaler.step(optimizer)
        scaler.update()
        weights.append(weight.tolist())
    assert weights[2] == weights[3] != weights[1]
    assert scaler.get_scale() == 4.0


# On a device.


def test_a_fused_optimizer_on_a_device_reads_no_loss():
    weight, host = parameter(), parameter()
    clipper, on_host = make([weight], scope="global"), make([host], scope="global")
    for loss in SERIES:
        host.grad = torch.tensor([3.0, 4.0])
        expected = on_host.step(loss=loss)
        weight.grad = watched(torch.tensor([3.0, 4.0]))
        clipper.observe_loss(watched(torch.tensor(loss)))
        with nothing_read():
            decision = clipper._stepper.clip()
        with looks_counted():
            assert decision.skipped.tolist() == expected.skipped.tolist()
    with looks_counted() as looks:
        metrics = clipper.metrics()
    assert looks == ["cpu"], "one transfer"
    for name, value in on_host.metrics().items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


# Checkpoints.

POLICIES = {
    "window": MeanStd(2.0, history_length=8),
    "all losses": MeanStd(2.0, history_length=None),
    "average": ZScore(3.0, warmup_steps=3),
    "combined": Warmup(Drop(Quantile(0.9, history_length=5), clip=Fixed(9.0)), steps=2),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_a_resumed_run_continues_bit_for_bit(policy, tmp_path):
    losses = np.random.default_rng(4).standard_normal(40).tolist()

    def start():
        return NormClip([parameter()], 1.0, loss_policy=policy)

    def steps(clipper, losses):
        [weight] = clipper.parameters
        taken = []
        for loss in losses:
            weight.grad = torch.ones(2)
            taken.append(clipper.step(loss=loss).skipped.item())
        return taken, clipper.metrics()

    whole, first = start(), start()
    expected = steps(whole, losses)
    begun = steps(first, losses[:20])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = start()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    ended, metrics = steps(resumed, losses[20:])
    assert (begun[0] + ended, metrics) == expected
    check_agreement(resumed)
    resumed.reset()
    assert steps(resumed, losses) == expected


def test_a_state_without_a_loss_policy_loads():
    old = NormClip([parameter()], 1.0)
    old.observe([1.0, 3.0])
    clipper = NormClip([parameter()], 1.0, loss_policy=LOSSES)
    clipper.parameters[0].grad = torch.ones(2)
    clipper.step(loss=3.0)
    clipper.load_state_dict(old.state_dict())
    assert clipper.metrics()["clip/steps"] == 2
    assert int(clipper.state_dict()["loss"]["state"]["loss_policy"]["count"]) == 0


def test_a_loss_policy_that_does_not_fit_is_refused():
    clipper = NormClip([parameter()], 1.0, loss_policy=LOSSES)
    state = clipper.state_dict()
    without = NormClip([parameter()], 1.0)
    with pytest.raises(ValueError, match=r"loss_policy is .*strict=False"):
        without.load_state_dict(state)
    without.load_state_dict(state, strict=False)
    other = NormClip([parameter()], 1.0, loss_policy=MeanStd(2.0, history_length=8))
    with pytest.raises(ValueError, match=r"loss_policy\.deviations is 3\.0"):
        other.load_state_dict(state)
    other.load_state_dict(state, strict=False)
    shorter = NormClip([parameter()], 1.0, loss_policy=MeanStd(2.0, history_length=4))
    kind = NormClip([parameter()], 1.0, loss_policy=Quantile(0.9, history_length=8))
    for wrong in (shorter, kind):
        with pytest.raises(ValueError, match="state does not fit this clipper"):
            wrong.load_state_dict(state, strict=False)
    state["loss"]["state"]["loss_skipped"].fill_(-1)
    with pytest.raises(ValueError, match="state is invalid: loss: loss_skipped"):
        clipper.load_state_dict(state)
    del state["loss"]["policy"]
    for damaged in (clipper, without):
        with pytest.raises(ValueError, match=r"loss is \['state'\] in the state"):
            damaged.load_state_dict(state)


def test_new_parameters_keep_the_losses():
    first = parameter()
    clipper = NormClip([first], 1.0, loss_policy=LOSSES)
    for loss in (1.0, 2.0):
        first.grad = torch.ones(2)
        clipper.step(loss=loss)
    clipper.add_param_group({"params": [parameter()]})
    [_, weight] = clipper.parameters
    weight.grad = torch.ones(2)
    clipper.step(loss=9.0)
    assert weight.grad is None
    assert clipper.metrics()["clip/loss_threshold"] == pytest.approx(1.5 + 3 * 0.5**0.5)
