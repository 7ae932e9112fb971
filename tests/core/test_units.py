"""Which elements of a parameter form a unit, by axis and by the rule of the NFNets."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoclip_core import ParamRatio, decide
from autoclip_core.clipper.units import (
    ParameterRows,
    Units,
    name_units,
    nfnets_units,
    one_unit,
    row_size,
    split_shape,
    transposed_conv_units,
    unit_count,
    unit_shape,
    units_along_axis,
)

from ..support.cases import NFNETS

shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)


def number_units(shape, units):
    """Return the number of the unit of each element, by the definition of a unit.

    Two elements are in one unit if they have the same index on every axis that the norm
    does not sum over.
    """
    split = split_shape(shape, units)
    unit_axes = [axis for axis in range(len(split)) if axis not in units.axes]
    unit_numbers, result = {}, []
    for place in itertools.product(*map(range, split)):
        key = tuple(place[axis] for axis in unit_axes)
        result.append(unit_numbers.setdefault(key, len(unit_numbers)))
    return np.array(result, int).reshape(shape)


@given(shapes, st.data())
def test_units_partition_a_parameter(shape, data):
    """Each element is in one unit. A norm per unit broadcasts to the parameter."""
    axis = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    for units in (one_unit(shape), units_along_axis(shape, axis)):
        assert unit_count(shape, units) == np.prod(unit_shape(shape, units), dtype=int)
        if 0 in shape:
            continue
        expected = number_units(shape, units)
        assert expected.max() + 1 == unit_count(shape, units)
        numbers = np.arange(unit_count(shape, units)).reshape(unit_shape(shape, units))
        np.testing.assert_array_equal(np.broadcast_to(numbers, shape), expected)


@pytest.mark.parametrize(
    ("shape", "axis", "count"),
    [
        ((), 0, 1),
        ((7,), 0, 1),
        ((1,), 0, 1),
        ((4, 3), 0, 4),
        ((4, 3), 1, 3),
        ((4, 3, 2), 0, 4),
        ((4, 3, 2, 2), 1, 3),
        ((0, 3), 0, 0),
        ((3, 0), 0, 3),
    ],
)
def test_each_index_of_the_output_axis_is_a_unit(shape, axis, count):
    units = units_along_axis(shape, axis)
    assert unit_count(shape, units) == count
    if len(shape) > 1 and 0 not in shape:
        expected = np.moveaxis(np.zeros(shape, int), axis, 0)
        expected = np.moveaxis(
            expected + np.arange(count).reshape(-1, *[1] * (len(shape) - 1)), 0, axis
        )
        np.testing.assert_array_equal(number_units(shape, units), expected)


@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    window=st.lists(st.integers(1, 2), max_size=2),
)
def test_units_of_a_transposed_convolution_are_its_output_channels(
    groups, inputs, outputs, window
):
    """Output channel c is in group c // outputs, and reads only its inputs."""
    shape = (groups * inputs, outputs, *window)
    units = transposed_conv_units(shape, groups)
    assert max(units.axes) < len(split_shape(shape, units))
    assert unit_count(shape, units) == groups * outputs
    expected = np.empty(shape, int)
    for i, j in itertools.product(range(groups * inputs), range(outputs)):
        expected[i, j] = i // inputs * outputs + j
    # Units are numbered in the order of the output channels.
    number = np.arange(groups * outputs).reshape(unit_shape(shape, units))
    actual = np.broadcast_to(number, split_shape(shape, units)).reshape(shape)
    np.testing.assert_array_equal(actual, expected)


# The rule of the NFNets.


@pytest.mark.parametrize(("shape", "axes"), NFNETS.items(), ids=str)
def test_the_rule_of_the_nfnets_chooses_these_axes(shape, axes):
    assert nfnets_units(shape) == Units(axes)


@pytest.mark.parametrize("shape", [(2,) * 6, (1, 1, 1, 2, 3, 1), (2,) * 7])
def test_the_nfnets_have_no_rule_for_six_axes(shape):
    with pytest.raises(ValueError, match="at most 5 axes") as raised:
        nfnets_units(shape)
    assert str(shape) in str(raised.value)
    assert 'use rule="unit", or exclude this parameter' in str(raised.value)


def clip_units(gradient, parameter, units, policy):
    """Clip a gradient by unit in NumPy; return the result and the decision."""
    norms = [
        np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=units.axes)).reshape(-1)
        for x in (gradient, parameter)
    ]
    state = policy.init(len(norms[0]))
    _, decision = decide(policy, state, norms[0], param_norms=norms[1])
    scale = decision.scale.reshape(unit_shape(gradient.shape, units))
    return np.where(scale == 1, gradient, scale * gradient), decision


@pytest.mark.needs("jax")
@pytest.mark.parametrize("shape", [s for s in NFNETS if len(s) < 6], ids=str)
def test_the_rule_agrees_with_adaptive_clipping_in_optax(shape):
    """The tolerance is 1e-6, because optax computes norms in float32.

    optax divides by max(norm, 1e-6); every gradient in this test has a larger norm.
    """
    import optax

    rng = np.random.default_rng(0)
    clipped = unclipped = 0
    for clipping, size in itertools.product((0.01, 0.16), (1e-3, 0.03, 1.0, 100.0)):
        transform = optax.adaptive_grad_clip(clipping, eps=1e-3)
        gradient = (size * rng.standard_normal(shape)).astype(np.float32)
        parameter = rng.standard_normal(shape).astype(np.float32)
        if size == 1.0:
            parameter *= 0  # eps, the smallest norm that counts, sets the threshold
        gradient, parameter = np.asarray(gradient), np.asarray(parameter)
        expected, _ = transform.update(gradient, transform.init(parameter), parameter)
        units, policy = nfnets_units(shape), ParamRatio(clipping, eps=1e-3)
        actual, decision = clip_units(gradient, parameter, units, policy)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        clipped += decision.clipped.sum()
        unclipped += (~decision.clipped).sum()
    assert clipped > 0
    assert unclipped > 0


def test_each_unit_has_a_name_and_a_single_one_has_that_of_the_parameter():
    assert name_units("w", (2, 3), Units((1,))) == ["w[0]", "w[1]"]
    assert name_units("w", (1, 3), Units((1,))) == ["w"]
    assert name_units("w", (0, 3), Units((1,))) == []


def test_a_parameter_that_is_not_divided_has_no_units():
    assert ParameterRows(2, 3) == ParameterRows(start=2, stop=3, units=None)


def test_a_row_has_its_share_of_the_elements():
    rows = {(0, 1): 24, (5, 13): 3, (5, 5): 24}
    for (start, stop), size in rows.items():
        assert row_size((8, 3), ParameterRows(start, stop)) == size
