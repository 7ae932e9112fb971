"""Edge cases: empty rows and groups, names, hints, shapes."""

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import (
    ClipLog,
    Fixed,
    MeanStd,
    ParamRatio,
    Quantile,
    ZScore,
    decide,
)
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip


def parameter(size=2):
    return nn.Parameter(torch.ones(size))


def test_metrics_of_no_rows_at_all():
    weight = nn.Parameter(torch.zeros(0, 3))
    weight.grad = torch.zeros(0, 3)
    clipper = AGC([weight])
    clipper.step()
    assert clipper.metrics()["clip/norm"] == 0
    assert clipper.metrics()["clip/threshold"] == float("inf")


def test_an_optimizer_may_have_an_empty_group():
    weight = parameter()
    inner = torch.optim.SGD([{"params": []}, {"params": [weight]}], lr=1.0)
    optimizer = QuantileClip.as_optimizer(inner)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [0.0, 0.0]


def test_a_group_keeps_its_name_if_another_is_excluded():
    first, second = parameter(), parameter()
    groups = [{"params": [("a", first)]}, {"params": [("b", second)]}]
    assert QuantileClip(groups, scope="group", exclude="a").names == ["group 1"]


def test_exclude_none_excludes_nothing():
    assert len(QuantileClip([parameter(), parameter()], exclude=None).names) == 2


@pytest.mark.parametrize("policy", [MeanStd(3.0), ZScore(3.0, warmup_steps=5)])
def test_a_threshold_beyond_float32_is_infinite_without_a_warning(policy):
    clipper = Clipper([parameter()], policy)
    clipper.observe([1e-38, 1e-30, 1.0, 1e30, 3e38])
    assert clipper.threshold().item() == float("inf")


def test_a_row_whose_scale_rounds_to_0_counts_as_dropped():
    weight = parameter()
    clipper = Clipper([weight], MeanStd(-3.0, history_length=8, log=True))
    for value in [1e-38, 1e-30, 1.0, 1e30]:
        weight.grad = torch.full((2,), value)
        clipper.step()
    assert 0 < clipper.threshold().item() < 1e-37
    assert weight.grad.tolist() == [0.0, 0.0]
    assert clipper.metrics()["clip/dropped_total"] == 1


@pytest.mark.parametrize("setting", [{"history_length": 5}, {"warmup_steps": 5}])
def test_strict_false_is_offered_only_if_it_helps(setting):
    weight = parameter()
    saved = QuantileClip([weight], **setting).state_dict()
    with pytest.raises(ValueError, match="does not fit") as caught:
        QuantileClip([weight]).load_state_dict(saved)
    assert "strict=False" not in str(caught.value)
    saved = QuantileClip([weight], quantile=0.5).state_dict()
    with pytest.raises(ValueError, match="strict=False"):
        QuantileClip([weight]).load_state_dict(saved)


@pytest.mark.parametrize(
    ("norms", "given", "name"),
    [
        ([[1.0]], {}, "norms"),
        (1.0, {}, "norms"),
        ([1.0, 2.0], {"observed": [True]}, "observed"),
        ([1.0, 2.0], {"param_norms": [1.0]}, "param_norms"),
    ],
)
def test_a_decision_has_one_entry_per_row(norms, given, name):
    policy = Quantile(0.9)
    with pytest.raises(ValueError, match=f"{name} must be of shape"):
        decide(policy, policy.init(2), norms, **given)


def test_weights_that_are_not_finite_leave_a_threshold():
    policy = ParamRatio(0.1, eps=0.01)
    weights = np.float32([np.nan, np.inf, 5.0])
    _, decision = decide(policy, policy.init(3), [1.0] * 3, param_norms=weights)
    np.testing.assert_allclose(decision.threshold, [0.001, 0.001, 0.5], rtol=1e-6)


@pytest.mark.parametrize("scope", ["parameter", "global"])
def test_a_gradient_that_two_parameters_share_is_scaled_once(scope):
    one, other = parameter(), parameter()
    one.grad = other.grad = torch.tensor([3.0, 4.0])
    Clipper([one, other], Fixed(1.0), scope=scope).step()
    norm = 5.0 if scope == "parameter" else 50**0.5
    for weight in (one, other):
        assert weight.grad.tolist() == pytest.approx([3 / norm, 4 / norm])


def test_in_a_dry_run_a_shared_gradient_stays_shared():
    one, other = parameter(), parameter()
    one.grad = other.grad = torch.tensor([3.0, 4.0])
    Clipper([one, other], Fixed(1.0), dry_run=True).step()
    assert one.grad is other.grad


@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_normed_transposed_convolution_is_cut_by_output(groups):
    layer = nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False)
    layer = nn.utils.parametrizations.weight_norm(layer)
    names = AGC(layer).names
    assert sum("original0" in name for name in names) == 4  # magnitudes
    assert sum("original1" in name for name in names) == 6  # the direction


@pytest.mark.parametrize("count", [-1, 6])
def test_a_count_outside_its_window_is_refused(count):
    weight = parameter()
    clipper = QuantileClip([weight], history_length=3)
    clipper.observe(2.0)
    before = clipper.threshold()
    state = clipper.state_dict()

    def spoil(node):
        if isinstance(node, dict):
            for name, value in node.items():
                if name == "count":
                    value.fill_(count)
                else:
                    spoil(value)

    spoil(state["states"][0])
    with pytest.raises(ValueError, match=f"counts {count} norms, and must count 0 to"):
        clipper.load_state_dict(state)
    assert torch.equal(clipper.threshold(), before)


def replace_weight(layer):
    """Replace a parameter as `fully_shard` and other wrappers do."""
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def one_step(model, clipper):
    model(torch.ones(1, 2)).sum().backward()
    return clipper.step()


def test_parameters_that_the_model_has_replaced_warn_if_the_optimizer_has_not():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    NormClip(model, max_norm=1.0).attach(optimizer)
    replace_weight(model[1])
    model(torch.ones(1, 2)).sum().backward()
    with pytest.warns(
        UserWarning, match=r"1 of the clipper's parameters, .* 1\.weight"
    ):
        optimizer.step()
    optimizer.step()  # it warns once


def test_parameters_that_all_left_the_model_warn_once():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    NormClip(model, max_norm=1.0).attach(optimizer)
    replace_weight(model)
    with pytest.warns(UserWarning, match="such as weight, left the model"):
        optimizer.step()
    optimizer.step()


def test_a_clipper_of_parameters_without_gradients_warns():
    model = torch.nn.Linear(2, 1, bias=False)
    clipper = NormClip(model.parameters(), max_norm=1.0)
    replace_weight(model)
    with pytest.warns(UserWarning, match="has not received a gradient"):
        one_step(model, clipper)
    one_step(model, clipper)  # it warns once


def test_a_parameter_that_a_parametrization_holds_is_still_the_model_s():
    model = torch.nn.Linear(2, 1)
    clipper = NormClip(model, max_norm=1.0)
    torch.nn.utils.parametrize.register_parametrization(
        model, "weight", torch.nn.Identity()
    )
    model.forward = lambda x: (x @ torch.ones(2, 1)) * model.bias
    one_step(model, clipper)  # the weight has no gradient


def test_a_frozen_parameter_needs_no_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    one_step(model, NormClip(model, max_norm=1.0))


def test_dry_run_can_be_switched_off():
    weight = torch.nn.Parameter(torch.zeros(2))
    clipper = NormClip([weight], max_norm=1.0, dry_run=True)
    for dry, left in ((True, 5.0), (False, 1.0)):
        clipper.dry_run = dry
        weight.grad = torch.tensor([3.0, 4.0])
        clipper.step()
        assert clipper.dry_run is dry
        assert weight.grad.norm() == pytest.approx(left)
    with pytest.raises(TypeError, match="dry_run must be"):
        clipper.dry_run = "no"


def test_a_log_takes_a_bfloat16_norm():
    log = ClipLog()
    log.record(norm=torch.tensor(3.0, dtype=torch.bfloat16), threshold=1.5)
    assert log.norms.tolist() == [3.0]
    assert log.scales.tolist() == [0.5]
