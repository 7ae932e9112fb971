"""Clipping each element, compared with torch's function, and its decision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autoclip_torch import ValueClip

from ..support.torch_gradients import (
    GRADIENTS,
    assert_same_bits,
    every_gradient,
    every_scope,
    numbers,
    odd_numbers,
    parameter,
    sparse,
    true_norms,
)

INF, NAN = float("inf"), float("nan")


def clamp(array, most):
    """Return each element, or each part of a complex one, limited to [-most, most]."""
    if np.iscomplexobj(array):
        return clamp(array.real, most) + 1j * clamp(array.imag, most)
    return np.minimum(np.maximum(array, -most), most)


def rows(array, scope):
    """Return the numbers of each row."""
    if scope == "unit" and array.ndim > 1:
        return list(array)
    return [array]


# The gradients.


@pytest.mark.parametrize("most", [0.1, 1 / 3, 1.0, 100.0])
@pytest.mark.parametrize(
    "name",
    [
        n
        for n, make in GRADIENTS.items()
        if not (make().is_sparse or make().is_complex())
    ],
)
def test_a_dense_gradient_is_clipped_as_torch_does_it(name, most):
    """Bit for bit, for any type and layout; torch's function takes only plain ones."""
    ours, torchs = (parameter(GRADIENTS[name]()) for _ in range(2))
    torchs.grad = torchs.grad.resolve_neg().contiguous().clone()
    torch.nn.utils.clip_grad_value_([torchs], most)
    for _ in range(2):  # the second step clips nothing
        ValueClip([ours], clip_value=most).step()
        assert_same_bits(ours.grad, torchs.grad)


@every_scope
@every_gradient
def test_the_decision_reports_the_norms_before_and_after(make, scope):
    p, most = parameter(make()), 0.75
    clipper = ValueClip([p], clip_value=most, scope=scope)
    for factor in (1, 0.01, 5):
        p.grad = make() * factor
        before = numbers(p.grad)
        expected = clamp(before, most)
        decision = clipper.step()
        if p.grad.dtype.itemsize == 2:
            np.testing.assert_allclose(numbers(p.grad), expected, rtol=4e-3)
        else:
            np.testing.assert_array_equal(numbers(p.grad), expected)
        norms, left = true_norms(before, scope), true_norms(expected, scope)
        np.testing.assert_allclose(decision.norm.numpy(), norms, rtol=1e-6)
        np.testing.assert_array_equal(decision.threshold.numpy(), np.float32(most))
        changed = [(row != clamp(row, most)).any() for row in rows(before, scope)]
        np.testing.assert_array_equal(decision.clipped.numpy(), changed)
        ratio = np.divide(left, norms, out=np.ones_like(norms), where=norms > 0)
        np.testing.assert_allclose(decision.scale.numpy(), ratio, rtol=2e-6)
        assert (decision.scale.numpy()[~decision.clipped.numpy()] == 1).all()
        assert decision.finite.all()
        assert not decision.skipped.any()
        for field in decision:
            assert field.shape == (len(clipper.names),)


finite = st.floats(-(2.0**60), 2.0**60, width=32)


@given(arrays(np.float32, (3, 4), elements=finite), st.floats(2.0**-60, 2.0**60))
def test_any_gradient(array, most):
    p, torchs = parameter(torch.tensor(array)), parameter(torch.tensor(array))
    decision = ValueClip([p], clip_value=most, scope="unit").step()
    torch.nn.utils.clip_grad_value_([torchs], most)
    assert_same_bits(p.grad, torchs.grad)
    changed = (torchs.grad.numpy() != array).any(axis=1)
    np.testing.assert_array_equal(decision.clipped.numpy(), changed)
    wide = numbers(torchs.grad), array.astype(np.float64)
    after, before = (true_norms(x, "unit") for x in wide)
    normal = before > 1e-37
    ratio = np.divide(after, before, out=np.ones(3), where=normal)
    np.testing.assert_allclose(decision.scale.numpy()[normal], ratio[normal], rtol=2e-6)
    assert (decision.scale <= 1).all()


@pytest.mark.parametrize(
    ("number", "most"),
    [
        (np.nextafter(np.float32(1), np.float32(2)), 1.0),
        (np.nextafter(np.float32(1e-20), np.float32(1)), float(np.float32(1e-20))),
        (-np.nextafter(np.float32(1e30), np.float32(INF)), float(np.float32(1e30))),
    ],
)
def test_one_element_above_by_one_bit_is_reported_as_clipped(number, most):
    """It is one of a million elements, so the norm hardly changes."""
    gradient = torch.full((2**20,), most)
    p = parameter(gradient.clone())
    clipper = ValueClip([p], clip_value=most)
    assert clipper.step().clipped.tolist() == [False]
    p.grad = gradient.clone()
    p.grad[12345] = float(number)
    decision = clipper.step()
    assert decision.clipped.tolist() == [True]
    assert decision.scale.item() == pytest.approx(1.0, abs=1e-6)
    assert_same_bits(p.grad.abs(), gradient)


def test_elements_within_the_limit_are_unchanged():
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        gradient = odd_numbers(dtype)
        p = parameter(gradient.clone())
        ValueClip([p], clip_value=0.5).step()
        assert_same_bits(p.grad, gradient)


def test_a_conjugated_gradient_is_clipped_in_place():
    """It is a conjugated view: clamping a resolved copy would change nothing."""
    gradient = torch.tensor([3 + 4j, 0.5 - 0.5j]).conj()
    assert gradient.is_conj()
    p = parameter(gradient)
    decision = ValueClip([p], clip_value=1.0).step()
    assert p.grad is gradient
    assert p.grad.resolve_conj().tolist() == [1 - 1j, 0.5 + 0.5j]
    assert decision.clipped.tolist() == [True]


@pytest.mark.parametrize("coalesced", [False, True])
def test_duplicates_of_a_sparse_gradient_are_clipped_as_their_sum(coalesced):
    """3 + 4 is 7 and becomes 2; clipped one by one they would be 2 + 2."""
    p = parameter(
        sparse([[1, 1, 0]], [[3.0], [4.0], [-1.0]], (4, 1), coalesced=coalesced)
    )
    decision = ValueClip([p], clip_value=2.0, scope="unit").step()
    assert p.grad.is_sparse
    assert p.grad.to_dense().tolist() == [[-1], [2], [0], [0]]
    assert decision.norm.tolist() == [1, 7, 0, 0]
    np.testing.assert_allclose(decision.scale.numpy(), [1, 2 / 7, 1, 1], rtol=1e-6)


def test_an_expanded_gradient_is_replaced():
    row = torch.tensor([[3.0, 0.5]])
    p = parameter(row.expand(3, 2))
    ValueClip([p], clip_value=1.0).step()
    assert p.grad.tolist() == [[1.0, 0.5]] * 3
    assert row.tolist() == [[3.0, 0.5]]


def test_an_embedding_trains_the_same_sparse_or_not():
    tables = []
    for is_sparse in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 3, sparse=is_sparse)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
        clipper = ValueClip(table, clip_value=0.3)
        for text in ([1, 1, 2], [0, 4, 4], [1, 5, 2]):
            optimizer.zero_grad()
            table(torch.tensor(text)).pow(2).sum().backward()
            assert clipper.step().clipped.all()
            optimizer.step()
        tables.append(table.weight.detach())
    torch.testing.assert_close(*tables)


# Non-finite gradients.


def three(dtype=torch.float32):
    """Return a finite parameter, one with a NaN, and one with an infinity."""
    numbers_of = [[3.0, 0.5], [NAN, 4.0], [-INF, 0.25]]
    return [parameter(torch.tensor(n, dtype=dtype)) for n in numbers_of]


def test_zero_removes_the_rows_that_are_not_finite():
    parameters = three()
    decision = ValueClip(parameters, clip_value=1.0).step()
    assert [p.grad.tolist() for p in parameters] == [[1.0, 0.5], [0, 0], [0, 0]]
    assert decision.finite.tolist() == [True, False, False]
    assert decision.clipped.tolist() == [True, False, False]
    expected = [np.hypot(1, 0.5) / np.hypot(3, 0.5), 0, 0]
    np.testing.assert_allclose(decision.scale.numpy(), expected, rtol=1e-6)


def test_propagate_clips_infinity_and_leaves_nan():
    parameters = three()
    decision = ValueClip(parameters, clip_value=1.0, nonfinite="propagate").step()
    left = [p.grad.tolist() for p in parameters]
    np.testing.assert_equal(left, [[1.0, 0.5], [NAN, 1.0], [-1.0, 0.25]])
    assert decision.finite.tolist() == [True, False, False]
    assert decision.scale.tolist()[1:] == [1.0, 1.0]


def test_skip_removes_every_gradient():
    parameters = three()
    clipper = ValueClip(
        parameters, clip_value=1.0, nonfinite="skip", max_consecutive_skips=1
    )
    decision = clipper.step()
    assert [p.grad for p in parameters] == [None] * 3
    assert decision.skipped.all()
    assert decision.scale.tolist() == [0.0] * 3
    assert clipper.metrics()["clip/skipped_total"] == 1
    parameters[0].grad = torch.tensor([3.0, 0.5])
    decision = clipper.step()
    assert not decision.skipped.any()
    assert parameters[0].grad.tolist() == [1.0, 0.5]
    assert clipper.metrics()["clip/skipped_total"] == 1
    parameters[1].grad = torch.tensor([INF, 0.0])
    clipper.step()
    parameters[1].grad = torch.tensor([INF, 0.0])
    with pytest.raises(RuntimeError, match="2 updates in a row were skipped"):
        clipper.step()


def test_raise_changes_nothing():
    parameters = three()
    clipper = ValueClip(parameters, clip_value=1.0, nonfinite="raise")
    with pytest.raises(FloatingPointError, match="parameter 1, parameter 2 is not"):
        clipper.step()
    np.testing.assert_equal(
        [p.grad.tolist() for p in parameters], [[3.0, 0.5], [NAN, 4.0], [-INF, 0.25]]
    )
    assert clipper.metrics()["clip/steps"] == 0


# Scopes, groups, settings.


def test_every_scope():
    """The gradients do not depend on the scope; only the reported norms do."""
    after = {}
    for scope in ("parameter", "group", "global", "unit"):
        torch.manual_seed(0)
        parameters = [parameter(torch.randn(shape)) for shape in [(2, 3), (4,), ()]]
        before = [numbers(p.grad) for p in parameters]
        decision = ValueClip(parameters, clip_value=0.5, scope=scope).step()
        after[scope] = [p.grad for p in parameters]
        norms = [true_norms(b, scope) for b in before]
        if scope in ("group", "global"):
            norms = [np.linalg.norm(norms, axis=0)]
        np.testing.assert_allclose(
            decision.norm.numpy(), np.concatenate(norms), rtol=1e-6
        )
    for gradients in after.values():
        for actual, expected in zip(gradients, after["parameter"], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("scope", ["parameter", "group", "unit"])
def test_a_group_may_have_a_value_of_its_own(scope):
    """One group has no numbers; at scope "unit" it has no row."""
    empty, small, large = (
        parameter(torch.full(s, 9.0)) for s in [(0, 3), (1, 2), (2, 2)]
    )
    groups = [
        {"params": [empty]},
        {"params": [large], "clip_value": 4.0},
        {"params": [small], "clip_value": 2},
    ]
    for order in (groups, groups[::-1]):
        small.grad, large.grad = torch.full((1, 2), 9.0), torch.full((2, 2), 9.0)
        decision = ValueClip(order, clip_value=1.0, scope=scope).step()
        assert small.grad.tolist() == [[2, 2]]
        assert large.grad.tolist() == [[4, 4], [4, 4]]
        of = {"parameter": [1, 4, 2], "group": [1, 4, 2], "unit": [4, 4, 2]}[scope]
        expected = of if order is groups else of[::-1]
        assert decision.threshold.tolist() == expected


def test_excluded_and_missing_gradients_are_left_alone():
    named = {name: parameter(torch.tensor([3.0])) for name in ("a", "b", "head")}
    named["b"].grad = None
    clipper = ValueClip(named.items(), clip_value=1.0, exclude="head")
    decision = clipper.step()
    assert clipper.names == ["a", "b"]
    assert [named[n].grad for n in ("a", "b", "head")] == [
        torch.tensor([1.0]),
        None,
        torch.tensor([3.0]),
    ]
    np.testing.assert_equal(decision.norm.tolist(), [3.0, NAN])
    assert decision.clipped.tolist() == [True, False]
    assert decision.finite.tolist() == [True, True]


def test_a_dry_run_changes_nothing_and_reports_everything():
    dry, wet = parameter(torch.tensor([3.0, 4.0])), parameter(torch.tensor([3.0, 4.0]))
    decision = ValueClip([dry], clip_value=1.0, dry_run=True).step()
    expected = ValueClip([wet], clip_value=1.0).step()
    assert dry.grad.tolist() == [3.0, 4.0]
    assert wet.grad.tolist() == [1.0, 1.0]
    for actual, wanted in zip(decision, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_it_records_nothing():
    clipper = ValueClip([parameter(torch.tensor([3.0]))], clip_value=1.0)
    with pytest.raises(TypeError, match="ValueClip records no norms"):
        clipper.observe(1.0)
    assert clipper.threshold().tolist() == [1.0]
    assert clipper.metrics()["clip/steps"] == 0


def test_metrics_of_a_run():
    """Some metrics are of the last step, others of all three."""
    first, second = parameter(torch.zeros(2)), parameter(torch.zeros(2))
    clipper = ValueClip([first, second], clip_value=1.0)
    for one, other in [([3, 4], [0, 0]), ([NAN, 0], [5, 0]), ([0.5, 2], [0, 12])]:
        first.grad = torch.tensor(one, dtype=torch.float32)
        second.grad = torch.tensor(other, dtype=torch.float32)
        clipper.step()
    metrics = clipper.metrics()
    before, after = np.linalg.norm([0.5, 2, 0, 12]), np.linalg.norm([0.5, 1, 0, 1])
    expected = {
        "clip/norm": before,
        "clip/threshold": 1.0,
        "clip/scale": after / before,
        "clip/norm_after": after,
        "clip/clipped": 1.0,
        "clip/clip_rate": 4 / 6,
        "clip/nonfinite_total": 1,
        "clip/skipped_total": 0,
        "clip/dropped_total": 0,
        "clip/steps": 3,
        "clip/rows": 2,
    }
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_a_resumed_state_continues_the_counts():
    p = parameter(torch.tensor([3.0]))
    clipper = ValueClip([p], clip_value=1.0)
    clipper.step()
    resumed = ValueClip([p], clip_value=1.0)
    resumed.load_state_dict(clipper.state_dict())
    p.grad = torch.tensor([0.5])
    resumed.step()
    assert resumed.metrics()["clip/steps"] == 2
    assert resumed.metrics()["clip/clip_rate"] == 0.5
