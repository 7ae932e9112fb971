"""Norms and scaled gradients on the CPU, for every kind of gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from autoclip_core import Fixed
from autoclip_core.clipper.norms import NORMS
from autoclip_torch import Clipper, NormClip

from ..support.torch_gradients import (
    GRADIENTS,
    INF,
    LARGEST,
    NAN,
    SMALLEST,
    TOKENS,
    TYPES,
    assert_same_bits,
    bits,
    every_gradient,
    every_scope,
    every_type,
    normal,
    numbers,
    odd_numbers,
    parameter,
    scaled,
    sparse,
    spread,
    true_norms,
)

# Norms.


@every_scope
@every_gradient
def test_the_norm_is_that_of_float64(make, scope):
    p = parameter(make())
    for norm in NORMS:
        expected = true_norms(numbers(p.grad), scope, norm)
        decision = Clipper([p], Fixed(1e30), scope=scope, norm=norm).step()
        assert decision.norm.dtype == torch.float32
        np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)
        assert decision.finite.all()
        assert not decision.clipped.any()


@pytest.mark.parametrize(
    ("number", "count"),
    [(600.0, 1), (600.0, 1000), (60000.0, 4), (1e-3, 100), (6e-8, 10)],
)
@every_type
def test_a_narrow_type_does_not_limit_the_norm(dtype, number, count):
    """In float16, 600² is infinite; in bfloat16, a sum of ones stops at 256."""
    gradient = torch.full((count,), number, dtype=dtype)
    expected = true_norms(numbers(gradient), "parameter")
    assert expected > 0
    decision = Clipper([parameter(gradient)], Fixed(1e30)).step()
    np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)


def test_a_thousand_parameters_of_bfloat16_in_one_row():
    parameters = [parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(1000)]
    decision = NormClip(parameters, max_norm=1e9).step()
    np.testing.assert_allclose(decision.norm.numpy(), [1000**0.5], rtol=1e-6)


LARGE = 2**20 + 3
SHAPES = {
    "vector": lambda x: x,
    "strided": lambda x: torch.stack([x, x], dim=1)[:, 0],
    "channels_last": lambda x: (
        x[: 2**20].view(16, 2**10, 8, 8).to(memory_format=torch.channels_last)
    ),
    "transposed": lambda x: x[: 2**20].view(2**8, 2**12).t(),
    "four long rows": lambda x: x[: 2**20].view(4, -1),
    "a long row": lambda x: x.view(1, -1),
    "many short rows": lambda x: x[: 2**20].view(-1, 8),
}


@pytest.mark.parametrize("dtype", [*TYPES, torch.complex64], ids=str)
@pytest.mark.parametrize("layout", SHAPES.values(), ids=list(SHAPES))
def test_a_large_gradient_is_measured_to_five_digits(layout, dtype):
    """A plain float32 sum of a million equal squares is off by 0.3 %."""
    spikes = torch.arange(0, LARGE, 8192)
    for values in (
        normal(LARGE),
        normal(LARGE).mul(1.5).exp(),  # heavy tails
        torch.full((LARGE,), 3.1),  # all rounding errors have one sign
        torch.full((LARGE,), 2.44e-4).index_fill(
            0, spikes, 1.0
        ),  # a few large numbers hide the others
    ):
        gradient = layout(values.to(dtype))
        p = torch.nn.Parameter(gradient.detach())  # only its shape matters
        p.grad = gradient
        wide = gradient.to(torch.float64 if not dtype.is_complex else torch.complex128)
        for scope in ("parameter", "unit"):
            expected = true_norms(wide.numpy(), scope)
            decision = Clipper([p], Fixed(1e30), scope=scope).step()
            np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("length", [2048, 3072, 8192])
def test_a_large_number_does_not_hide_small_ones_in_its_unit(length):
    gradient = torch.full((512, length), 2.44e-4)
    gradient[:, 0] = 1.0
    p = parameter(gradient)
    decision = Clipper([p], Fixed(1e30), scope="unit").step()
    expected = true_norms(gradient.double().numpy(), "unit")
    np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-5)


@every_scope
def test_a_scale_of_1_leaves_infinite_complex_numbers_alone(scope):
    """The complex number 1 is 1 + 0j, and its product with inf + 1j is inf + nan j."""
    gradient = torch.complex(torch.full((4, 3), INF), torch.ones(4, 3))
    gradient[1:] = 1 + 1j
    p = parameter(gradient.clone())
    clipper = Clipper([p], Fixed(1.0), scope=scope, nonfinite="propagate")
    clipped = clipper.step().clipped.numpy()
    assert clipped.tolist() == (
        [False, True, True, True] if scope == "unit" else [False]
    )
    assert_same_bits(p.grad[0], gradient[0])


# Short tensors are measured together, long ones in strips by several methods.


def mixed(count):
    """Yield short gradients of several types and shapes; some are empty or zero."""
    for i in range(count):
        dtype = [torch.float32, torch.bfloat16, torch.float16, torch.float32][i % 4]
        gradient = normal(1 + i % 64, 1 + 97 * i % 128, dtype=dtype, seed=i)
        if i % 10 == 3:
            gradient = gradient.float() * [0.0, 1e25, 1e-25][i // 10 % 3]
        yield gradient[:0] if i % 50 == 7 else gradient


@every_scope
def test_many_short_gradients(scope):
    """There are more than fit into one copy. Some have squares outside float32."""
    gradients = list(mixed(400))
    parameters = list(map(parameter, gradients))
    parameters[5].grad = None
    norms = [
        np.full(len(true_norms(numbers(g), scope)), np.nan)
        if p.grad is None
        else true_norms(numbers(g), scope)
        for g, p in zip(gradients, parameters, strict=True)
    ]
    expected = np.concatenate(norms)
    if scope == "global":
        expected = np.sqrt([np.nansum(expected**2)])
    decision = Clipper(parameters, Fixed(1e38), scope=scope).step()
    np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)
    assert decision.finite.all()


@pytest.mark.parametrize("length", [8191, 8192, 8193, 3 * 8192 + 5, 2**18, 2**18 + 1])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_at_lengths_where_the_reading_changes(length, rows, dtype):
    """Large numbers at both ends show that each strip is read exactly once."""
    gradient = normal(rows, length, dtype=dtype)
    gradient[:, 0], gradient[:, -1] = 300.0, 700.0
    for scope in ("parameter", "unit"):
        expected = true_norms(numbers(gradient), scope)
        decision = Clipper([parameter(gradient)], Fixed(1e30), scope=scope).step()
        np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)


# Overflow and underflow of squares.

MAGNITUDES = [1e30, 1e25, 3e18, 1e19, 1e20, 3e-13, 1e-13, 1e-20, 1e-25, 1e-30, 1e-34]


@every_scope
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
def test_finite_gradients_whose_squares_are_not_in_range(dtype, magnitude, scope):
    gradient = normal(3, 10, dtype=dtype) * magnitude
    expected = true_norms(numbers(gradient), scope)
    p = parameter(gradient.clone())
    limit = 0.01 * magnitude
    decision = Clipper([p], Fixed(limit), scope=scope).step()
    np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)
    assert decision.finite.all()
    assert decision.clipped.all()
    after = true_norms(numbers(p.grad), scope)
    np.testing.assert_allclose(after, limit, rtol=1e-2 if "bf" in str(dtype) else 1e-6)


def test_ten_times_1e30_is_clipped_and_not_zeroed():
    p = parameter(torch.full((10,), 1e30))
    decision = Clipper([p], Fixed(1.0)).step()
    np.testing.assert_allclose(decision.norm.numpy(), [10**0.5 * 1e30], rtol=1e-6)
    np.testing.assert_allclose(p.grad.numpy(), np.full(10, 10**-0.5), rtol=1e-6)


# Numbers of every size: the sum of squares leaves the safe range at both ends.
exponents = st.floats(-37, 36, width=32)
sized = st.builds(lambda e, sign: sign * 10.0**e, exponents, st.sampled_from([-1, 1]))


@given(
    arrays(np.float64, st.tuples(st.just(3), st.integers(1, 5)), elements=sized),
    st.sampled_from(["parameter", "unit"]),
    st.booleans(),
)
def test_the_norm_is_right_at_any_size(array, scope, transposed):
    array = array.astype(np.float32)
    gradient = (
        torch.from_numpy(array.T.copy()).t() if transposed else torch.tensor(array)
    )
    decision = Clipper([parameter(gradient)], Fixed(1e38), scope=scope).step()
    expected = true_norms(array.astype(np.float64), scope)
    np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)
    assert decision.finite.all()


@pytest.mark.parametrize("at", [1e-25, 1e38])
@pytest.mark.parametrize("nudge", [0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_scope
def test_the_norm_is_right_on_both_sides_of_where_float64_begins(
    at, nudge, dtype, scope
):
    gradient = torch.full((4, 8), (at * nudge / 32) ** 0.5, dtype=dtype)
    expected = true_norms(numbers(gradient), scope)
    decision = Clipper([parameter(gradient)], Fixed(1e38), scope=scope).step()
    np.testing.assert_allclose(decision.norm.numpy(), expected, rtol=1e-6)


@every_scope
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_norm_above_the_largest_float32_is_not_finite(dtype, scope):
    """The largest norm is clipped, a larger one zeroed; all numbers are finite."""
    fits = parameter(torch.full((1, 4), LARGEST / 2.0001, dtype=dtype))
    beyond = parameter(torch.full((1, 4), LARGEST / 1.9999, dtype=dtype))
    for p, finite in ((fits, True), (beyond, False)):
        decision = Clipper([p], Fixed(1.0), scope=scope).step()
        assert decision.finite.tolist() == [finite]
        assert decision.clipped.tolist() == [finite]
        np.testing.assert_allclose(p.grad.numpy(), 0.5 if finite else 0.0, rtol=1e-6)


def test_a_norm_below_the_smallest_normal_float32_is_zero_and_stays():
    gradient = torch.tensor([SMALLEST / 2, -SMALLEST / 4])
    p = parameter(gradient.clone())
    decision = Clipper([p], Fixed(1e-44)).step()
    assert decision.norm.tolist() == [0.0]
    assert not decision.clipped.any()
    assert_same_bits(p.grad, gradient)


@pytest.mark.parametrize("first", [NAN, INF, 1e200, 1e30])
@pytest.mark.parametrize("second", [NAN, INF, 1.0])
def test_a_row_of_several_tensors_hides_no_nan(first, second):
    pair = [torch.tensor([x], dtype=torch.float64) for x in (first, second)]
    decision = NormClip(
        map(parameter, pair), max_norm=1.0, nonfinite="propagate"
    ).step()
    expected = NAN if np.isnan([first, second]).any() else INF
    if (first, second) == (1e30, 1.0):
        expected = 1e30
    np.testing.assert_allclose(decision.norm.numpy(), [expected], rtol=1e-6)


# Scaling.


@every_scope
@every_gradient
def test_a_clipped_row_is_scaled_in_float32_and_cast_back(make, scope):
    """Three steps clip some rows and leave other rows; all agree bit for bit."""
    p = parameter(make())
    norms = true_norms(numbers(p.grad), scope)
    limit = float(np.float32(0.6 * norms.max(initial=0))) or 1.0
    clipper = Clipper([p], Fixed(limit), scope=scope)
    for factor in (1, 2, 3):
        # A product is no longer a conjugated or negated view.
        p.grad = make() if factor == 1 else make() * factor
        before, dense = p.grad, p.grad.to_dense().clone()
        decision = clipper.step()
        norms = true_norms(numbers(dense), scope)
        np.testing.assert_allclose(decision.norm.numpy(), norms, rtol=1e-6)
        clipped = decision.clipped.numpy()
        np.testing.assert_array_equal(clipped, norms > limit)
        ratio = np.float32(limit) / np.where(clipped, decision.norm.numpy(), 1)
        scale = np.where(clipped, ratio, np.float32(1))
        np.testing.assert_array_equal(decision.scale.numpy(), scale)
        expected = scaled(dense, scale, clipped)
        if before.is_sparse:
            # Duplicates are scaled one by one, so their sum is rounded differently.
            torch.testing.assert_close(p.grad.to_dense(), expected)
        else:
            assert_same_bits(p.grad, expected)
        overlaps = 0 in before.stride() if not before.is_sparse else False
        assert (p.grad is before) or overlaps


@every_type
@given(data=st.data())
def test_scaling_is_one_product_in_float32(dtype, data):
    exponent = 4.0 if dtype == torch.float16 else 15.0
    elements = st.floats(-exponent, exponent).map(lambda e: float(10.0**e))
    array = data.draw(arrays(np.float64, (3, 4), elements=elements))
    gradient = torch.from_numpy(array).to(dtype)
    limit = data.draw(st.floats(-exponent, exponent).map(lambda e: float(10.0**e)))
    for scope in ("parameter", "unit"):
        p = parameter(gradient.clone())
        decision = Clipper([p], Fixed(limit), scope=scope).step()
        n = true_norms(numbers(gradient), scope)
        np.testing.assert_allclose(decision.norm.numpy(), n, rtol=1e-6)
        scale, clipped = decision.scale.numpy(), decision.clipped.numpy()
        np.testing.assert_allclose(scale, np.minimum(1, limit / n), rtol=2e-6)
        assert_same_bits(p.grad, scaled(gradient, scale, clipped))


def test_an_expanded_gradient_is_replaced_and_its_memory_is_unchanged():
    """Scaling in place would scale its one row four times, and torch refuses that."""
    row = torch.tensor([[3.0, 4.0]])
    for scope in ("parameter", "unit"):
        p = parameter(row.expand(4, 2))
        Clipper([p], Fixed(1.0), scope=scope).step()
        after = true_norms(numbers(p.grad), scope)
        np.testing.assert_allclose(after, 1.0, rtol=1e-6)
        assert row.tolist() == [[3.0, 4.0]]
    kept = row.expand(4, 2)
    p = parameter(kept)
    Clipper([p], Fixed(100.0)).step()
    assert p.grad is kept, "nothing was to be scaled"


def test_the_layout_of_memory_stays():
    gradient = normal(4, 3, 2, 5).to(memory_format=torch.channels_last)
    p = parameter(gradient)
    for scope in ("parameter", "unit"):
        Clipper([p], Fixed(0.1), scope=scope).step()
        assert p.grad is gradient
        assert p.grad.is_contiguous(memory_format=torch.channels_last)


def test_one_row_of_mixed_types():
    """The norm is computed in float64; each type is scaled in float32."""
    dtypes = [*TYPES, torch.complex64]
    gradients = [normal(2, 3, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    gradients.append(sparse(*TOKENS, coalesced=True))
    parameters = [parameter(gradient.clone()) for gradient in gradients]
    decision = NormClip(parameters, max_norm=0.5).step()
    total = np.linalg.norm([np.linalg.norm(numbers(g)) for g in gradients])
    np.testing.assert_allclose(decision.norm.numpy(), [total], rtol=1e-6)
    for p, gradient in zip(parameters, gradients, strict=True):
        expected = scaled(
            gradient.to_dense(), decision.scale.numpy(), decision.clipped.numpy()
        )
        assert_same_bits(p.grad.to_dense(), expected)


def test_a_gradient_with_an_autograd_graph():
    """After `backward(create_graph=True)`, a gradient requires a gradient."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = (weight**3).sum()
    (weight.grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    assert weight.grad.requires_grad
    for scope in ("parameter", "unit"):
        decision = Clipper([weight], Fixed(1.0), scope=scope).step()
        assert not decision.norm.requires_grad
    np.testing.assert_allclose(np.linalg.norm(numbers(weight.grad)), 1.0, rtol=1e-6)


# Rows that are not clipped are unchanged bit for bit.

PAYLOADS = {
    torch.float32: [0x7FC12345, 0x7F800001, -0x3EDCC],
    torch.float64: [0x7FF8000012345678, 0x7FF0000000000001],
    torch.float16: [0x7E01, 0x7C01],
    torch.bfloat16: [0x7FC1, 0x7F81],
}


@every_scope
@every_type
def test_a_row_within_its_limit_is_unchanged(dtype, scope):
    gradient = torch.stack([odd_numbers(dtype), odd_numbers(dtype).flip(0)])
    assert (gradient == 0).sum() == 4
    p = parameter(gradient.clone())
    clipper = Clipper([p], Fixed(1.0), scope=scope)
    for _ in range(3):
        clipper.step()
        assert_same_bits(p.grad, gradient)


@every_type
def test_a_unit_is_unchanged_next_to_a_clipped_unit(dtype):
    odd = odd_numbers(dtype)
    gradient = torch.stack([odd, torch.full_like(odd, 30.0), -odd])
    p = parameter(gradient.clone())
    decision = Clipper([p], Fixed(1.0), scope="unit").step()
    assert decision.clipped.tolist() == [False, True, False]
    assert_same_bits(p.grad[::2], gradient[::2])
    norm = np.linalg.norm(numbers(p.grad[1]))
    np.testing.assert_allclose(norm, 1.0, rtol=max(1e-6, 4 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@every_type
def test_propagate_leaves_nan_payloads_and_infinity_unchanged(dtype, scope):
    odd = odd_numbers(dtype)
    payloads = torch.tensor(PAYLOADS[dtype], dtype=bits(odd).dtype).view(dtype)
    assert payloads.isnan().all()
    rows = [odd.clone() for _ in range(3)]
    rows[0][: len(payloads)] = payloads
    rows[1][-1] = -INF
    gradient = torch.stack(rows)
    p = parameter(gradient.clone())
    assert_same_bits(p.grad, gradient)
    clipper = Clipper([p], Fixed(1e-3), scope=scope, nonfinite="propagate")
    decision = clipper.step()
    if scope == "parameter":
        assert decision.finite.tolist() == [False]
        assert_same_bits(p.grad, gradient)
    else:
        assert decision.finite.tolist() == [False, False, True]
        assert_same_bits(p.grad[:2], gradient[:2])
        assert decision.clipped.tolist() == [False, False, True]


# Non-finite rows become zero.


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("scope", ["parameter", "unit", "global"])
@pytest.mark.parametrize("name", [n for n, make in GRADIENTS.items() if make().numel()])
def test_zero_means_zero(name, scope, bad):
    """0 * inf is NaN, so nothing is multiplied. The other rows are scaled as usual."""
    gradient = GRADIENTS[name]()
    if gradient.is_sparse:
        if not gradient._nnz():
            return
        gradient._values().view(-1)[0] = bad
    else:
        gradient = gradient.clone()  # writable, also if it was expanded
        gradient[(0,) * gradient.ndim] = bad
    p, dense = parameter(gradient), gradient.to_dense().clone()
    with np.errstate(invalid="ignore"):  # abs(nan + inf j)
        norms = true_norms(numbers(dense), scope)
    decision = Clipper([p], Fixed(0.5), scope=scope).step()
    finite = np.isfinite(norms)
    assert not finite.all()
    np.testing.assert_array_equal(decision.finite.numpy(), finite)
    np.testing.assert_array_equal(decision.scale.numpy()[~finite], 0.0)
    after = numbers(p.grad)
    lost = np.broadcast_to(spread(~finite, dense), dense.shape)
    assert (after[lost] == 0).all()
    assert np.isfinite(after).all()
    kept = np.minimum(norms[finite], 0.5)
    rtol = 1e-2 if dense.dtype.itemsize == 2 else 1e-6
    np.testing.assert_allclose(
        true_norms(after, scope)[finite], kept, rtol=rtol, atol=1e-12
    )


# Sparse gradients.


@pytest.mark.parametrize("coalesced", [False, True])
def test_the_norm_of_duplicates_is_that_of_their_sum(coalesced):
    """Token 1 appears twice: the norm is |3 + 4| = 7, not 5."""
    p = parameter(sparse([[1, 1]], [[3.0], [4.0]], (4, 1), coalesced=coalesced))
    decision = Clipper([p], Fixed(1.0)).step()
    assert decision.norm.tolist() == [7.0]
    assert p.grad.is_sparse
    np.testing.assert_allclose(numbers(p.grad), [[0], [1], [0], [0]], rtol=1e-6)


def test_the_stored_numbers_of_a_sparse_gradient_are_scaled_in_place():
    for scope in ("parameter", "unit"):
        gradient = sparse(*TOKENS)
        stored = gradient._values()
        p = parameter(gradient)
        Clipper([p], Fixed(0.5), scope=scope).step()
        assert p.grad is gradient
        assert gradient._values().data_ptr() == stored.data_ptr()
        assert gradient._nnz() == 4


TEXTS = [[1, 1, 2], [0, 4, 4], [3, 3, 3], [2, 0, 1]]


@every_scope
def test_an_embedding_is_clipped_the_same_sparse_or_not(scope):
    """Four steps of training give the same norms and the same table."""
    tables, all_norms = [], []
    for is_sparse in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 3, sparse=is_sparse)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
        clipper = Clipper(table, Fixed(0.7), scope=scope)
        norms = []
        for text in TEXTS:
            optimizer.zero_grad()
            table(torch.tensor(text)).pow(2).sum().backward()
            assert table.weight.grad.is_sparse == is_sparse
            norms.append(clipper.step().norm)
            optimizer.step()
        tables.append(table.weight.detach())
        all_norms.append(torch.stack(norms))
    torch.testing.assert_close(*tables)
    torch.testing.assert_close(*all_norms)
    if scope == "unit":
        idle = [sorted(set(range(6)) - set(text)) for text in TEXTS]
        for norms, rows in zip(all_norms[1], idle, strict=True):
            assert (norms[rows] == 0).all()
            assert (norms > 0).sum() == 6 - len(rows)


SPOILT = {
    "zero": lambda g: g.zero_(),
    "nan": lambda g: g.view(-1)[:1].fill_(float("nan")),
    "normal": lambda g: g,
}


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SPOILT)
def test_no_temporary_has_the_size_of_the_gradient(kind, dtype, scope):
    """A copy in float64 or a wider type is made in pieces."""
    weight = torch.nn.Parameter(torch.ones(4096, 4096, dtype=dtype))
    clipper = Clipper([weight], Fixed(0.5), scope=scope)
    weight.grad = torch.full_like(weight, 0.1)
    SPOILT[kind](weight.grad)
    size = weight.grad.numel() * weight.grad.itemsize
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        clipper.step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    current = peak = 0
    for _, change in sorted(changes):
        current += change
        peak = max(peak, current)
    assert changes
    assert peak < 0.9 * size
