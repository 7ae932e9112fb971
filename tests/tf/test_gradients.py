"""Norms and scaling of Keras gradients, against NumPy in float64."""

import numpy as np
import pytest
import tensorflow as tf

from autoclip_core.clipper.norms import NORMS
from autoclip_core.clipper.units import ParameterRows, Units, one_unit, unit_count
from autoclip_tf import AGC
from autoclip_tf.gradients.measure import find_largest, measure_norms
from autoclip_tf.gradients.row_tensor import RowTensor, find_observed
from autoclip_tf.gradients.scale import map_elements, scale_all

from ..support.account import norm_of

MODES = {
    "eager": lambda step: step,
    "graph": tf.function,
    "xla": lambda step: tf.function(step, jit_compile=True),
}


def every_mode():
    return pytest.mark.parametrize("mode", MODES)


def slices(indices, values, rows):
    values = tf.constant(values)
    shape = tf.constant([rows, *values.shape[1:]])
    return tf.IndexedSlices(values, tf.constant(indices), shape)


def dense(sparse):
    """Return the dense gradient of slices, summed by NumPy."""
    full = np.zeros([int(n) for n in sparse.dense_shape], np.float64)
    np.add.at(full, np.asarray(sparse.indices), np.float64(sparse.values))
    return full


def row_tensor(tensor, units=None, start=0):
    shape = tuple(int(n) for n in getattr(tensor, "dense_shape", tensor.shape))
    count = 1 if units is None else unit_count(shape, units)
    return RowTensor(ParameterRows(start, start + count, units), tensor, shape)


@every_mode()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_norms_are_those_of_float64(dtype, mode):
    def norms(*grads):
        tensors = [row_tensor(g, start=i) for i, g in enumerate(grads)]
        return [measure_norms(tensors, len(tensors), norm) for norm in NORMS]

    measure_all = MODES[mode](norms)
    for size in [1e-3, 1.0] if dtype == "float16" else [1e-30, 1e-3, 1.0, 1e30]:
        rng = np.random.default_rng(0)
        grads = [
            tf.cast(size * rng.normal(size=shape), dtype)
            for shape in [(40, 30), (7,), (), (0, 3)]
        ]
        for got, norm in zip(measure_all(*grads), NORMS, strict=True):
            assert got.dtype == tf.float32
            wanted = [norm_of([np.asarray(g, np.float64)], norm) for g in grads]
            message = f"{norm}, size {size}"
            np.testing.assert_allclose(got, wanted, rtol=1e-5, err_msg=message)


@every_mode()
def test_rounding_does_not_add_up_in_a_long_sum(mode):
    # By default XLA on CPU adds one element after the other.
    ones = tf.fill([4096, 2048], np.float32(0.1))
    [got] = MODES[mode](lambda tensor: measure_norms([row_tensor(tensor)], 1))(ones)
    assert got.numpy() == pytest.approx(float(np.float32(0.1)) * 2896.3093757, rel=2e-6)


@every_mode()
@pytest.mark.parametrize(
    "shape", [(1_000_000, 1), (1, 4_000_000), (4_000_000,), (1000, 1000)], ids=str
)
def test_a_long_gradient_of_any_shape_has_an_accurate_norm(shape, mode):
    normal = np.random.default_rng(0).standard_normal(shape, np.float32)
    equal = np.full(shape, 3.1, np.float32)
    spike = np.full(shape, 1e-3, np.float32)
    spike.flat[0] = 30
    norm = MODES[mode](lambda tensor: measure_norms([row_tensor(tensor)], 1))
    for values in [normal, equal, spike]:
        [got] = norm(tf.constant(values))
        assert got.numpy() == pytest.approx(
            np.linalg.norm(np.float64(values)), rel=2e-6
        )


@every_mode()
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_long_units_have_accurate_norms_along_any_axis(axis, mode):
    # The first length leaves one element after strips of 1024; strips of 256 fit.
    for length in [102_401, 100_096]:
        values = np.random.default_rng(0).standard_normal((2, 3, length), np.float32)
        values = np.moveaxis(values, 2, axis)
        units = row_tensor(tf.constant(values), Units((axis,)))
        norms = MODES[mode](lambda tensor, units=units: measure(tensor, units))
        got, top = norms(units.tensor)
        wanted = np.linalg.norm(np.float64(values), axis=axis)
        np.testing.assert_allclose(got, wanted.ravel(), rtol=2e-6)
        np.testing.assert_array_equal(top, np.abs(values).max(axis).ravel())


def measure(tensor, like):
    """Return the norms and the largest magnitudes of the rows of a tensor."""
    tensors = [like._replace(tensor=tensor)]
    return measure_norms(tensors, like.rows.stop), find_largest(tensors, like.rows.stop)


def test_the_variable_gives_the_shape_if_the_graph_has_none():
    values = np.random.default_rng(0).standard_normal((3, 5000), np.float32)
    rows, unknown = ParameterRows(0, 3, Units((1,))), tf.TensorSpec((None, None))

    @tf.function(input_signature=[unknown])
    def norms(tensor):
        return measure_norms([RowTensor(rows, tensor, values.shape)], 3)

    wanted = np.linalg.norm(np.float64(values), axis=1)
    np.testing.assert_allclose(norms(values), wanted, rtol=2e-6)


@every_mode()
def test_a_row_of_several_gradients_has_their_joint_norm(mode):
    grads = [tf.constant([3.0, 0.0]), tf.constant([[4.0]]), tf.constant([12.0])]
    together = MODES[mode](
        lambda *grads: [
            measure_norms([row_tensor(g) for g in grads], 1, n) for n in NORMS
        ]
    )
    expected = [[13.0], [13.0 / 2], [12.0]]
    np.testing.assert_allclose(together(*grads), expected)
    huge = MODES[mode](
        lambda *grads: measure_norms([row_tensor(g * 1e25) for g in grads], 1)
    )
    np.testing.assert_allclose(huge(*grads), [13e25], rtol=1e-6)


@every_mode()
@pytest.mark.parametrize("units", [None, Units((1,)), one_unit((6, 2)), Units((0,))])
def test_slices_of_one_index_are_summed_before_the_norm(units, mode):
    sparse = slices([4, 1, 4], np.float32([[3, 1], [2, 2], [4, -1]]), 6)
    full = dense(sparse)
    over = None if units is None else units.axes
    wanted = np.sqrt(np.sum(full**2, axis=over)).reshape(-1)
    rows = row_tensor(sparse, units).rows

    def norms(values, indices):
        gradient = tf.IndexedSlices(values, indices, sparse.dense_shape)
        tensors = [RowTensor(rows, gradient, (6, 2))]
        found = [measure_norms(tensors, len(wanted), norm) for norm in NORMS]
        return *found, find_largest(tensors, len(wanted))

    got, rms, *tops = MODES[mode](norms)(sparse.values, sparse.indices)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    # The absent rows of a sparse gradient count as zeros.
    np.testing.assert_allclose(rms, wanted / (12 / len(wanted)) ** 0.5, rtol=1e-6)
    largest = np.max(np.abs(full), axis=over).reshape(-1)
    for top in tops:
        np.testing.assert_allclose(top, largest, rtol=1e-6)


def test_the_norm_of_two_slices_is_that_of_their_sum():
    sparse = slices([0, 0], np.float32([[3.0], [4.0]]), 5)
    assert measure_norms([row_tensor(sparse)], 1).numpy() == 7.0
    assert tf.linalg.global_norm([sparse]).numpy() == 5.0  # unlike `measure_norms`


@pytest.mark.parametrize("units", [None, Units((1,)), one_unit((6, 2))])
def test_scaled_slices_stay_slices_of_the_scaled_gradient(units):
    sparse = slices([4, 1, 4], np.float32([[3, 1], [2, 2], [4, -1]]), 6)
    sparse_tensor = row_tensor(sparse, units)
    scales = np.linspace(0.0, 1.0, sparse_tensor.rows.stop, dtype=np.float32)
    scales = scales if units == Units((1,)) else np.float32([0.25])
    [got] = scale_all([sparse_tensor], tf.constant(scales))
    assert isinstance(got, tf.IndexedSlices)
    np.testing.assert_array_equal(got.indices, sparse.indices)
    np.testing.assert_allclose(dense(got), dense(sparse) * scales.reshape(-1, 1))


def test_slices_become_dense_if_units_cross_them():
    sparse = slices([4, 1], np.float32([[3, 1], [2, 2]]), 6)
    [got] = scale_all([row_tensor(sparse, Units((0,)))], tf.constant([0.5, 1.0]))
    np.testing.assert_allclose(got, dense(sparse) * [0.5, 1.0])


@every_mode()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_scale_of_one_changes_nothing_and_a_scale_of_zero_gives_zero(dtype, mode):
    values = tf.cast(np.array([[1.5, -0.0, 3e-5], [np.inf, np.nan, 2.0]]), dtype)

    def step(tensor, scales):
        return scale_all([row_tensor(tensor, Units((1,)))], scales)[0]

    got = MODES[mode](step)(values, tf.constant([1.0, 0.0]))
    assert got.dtype == values.dtype
    same = np.asarray(got)[0].tobytes() == np.asarray(values)[0].tobytes()
    assert same
    np.testing.assert_array_equal(np.float64(got)[1], [0.0, 0.0, 0.0])


@every_mode()
def test_units_are_measured_and_scaled_separately(mode):
    rng = np.random.default_rng(1)
    kernel = tf.constant(rng.normal(size=(3, 4, 5)), tf.float32)
    units = Units((0, 2))

    def step(tensor):
        norms, *others = [
            measure_norms([row_tensor(tensor, units)], 4, n) for n in NORMS
        ]
        return others, norms, scale_all([row_tensor(tensor, units)], 1.0 / norms)[0]

    (rms, largest), norms, scaled = MODES[mode](step)(kernel)
    wanted = np.sqrt(np.sum(np.float64(kernel) ** 2, axis=(0, 2)))
    np.testing.assert_allclose(norms, wanted, rtol=1e-6)
    np.testing.assert_allclose(rms, wanted / 15**0.5, rtol=1e-6)
    np.testing.assert_array_equal(largest, np.abs(kernel).max((0, 2)))
    np.testing.assert_allclose(scaled, kernel / wanted[:, None], rtol=1e-5)


def test_elements_are_mapped_after_slices_are_summed():
    sparse = slices([4, 1, 4], np.float16([[3], [2], [4]]), 6)
    got = map_elements(lambda values: tf.minimum(values, 5.0), row_tensor(sparse))
    assert isinstance(got, tf.IndexedSlices)
    assert got.dtype == tf.float16
    np.testing.assert_array_equal(dense(got), np.minimum(dense(sparse), 5.0))


def test_the_rows_that_have_a_gradient_are_observed():
    tensors = [
        row_tensor(tf.zeros(2), start=1),
        row_tensor(tf.zeros((2, 3)), Units((1,)), start=3),
    ]
    assert find_observed(tensors, 6).tolist() == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    np.testing.assert_array_equal(measure_norms(tensors, 6), np.zeros(6))


def test_without_gradients_every_norm_is_zero():
    np.testing.assert_array_equal(measure_norms([], 3), np.zeros(3))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_slices_that_units_cross_are_scaled_in_a_graph(jit_compile):
    weight, clip = tf.Variable(tf.ones((3, 2))), AGC(0.5)

    @tf.function(jit_compile=jit_compile)
    def clipped(values):
        slices = tf.IndexedSlices(values, tf.constant([0, 0]), tf.constant([3, 2]))
        [(gradient, _)] = clip([(slices, weight)])
        return tf.convert_to_tensor(gradient)

    gradient = clipped(tf.constant([[3.0, 0.0], [4.0, 0.01]]))
    limit = 0.5 * np.sqrt(3)
    wanted = [[limit, 0.01], [0.0, 0.0], [0.0, 0.0]]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)
