"""The reference clipper of the tests agrees with a calculation by hand."""

import math

import numpy as np
import pytest

from ..support.torch_models import small_model
from ..support.torch_reference import Reference


def test_the_reference_agrees_with_a_calculation_by_hand():
    """Rows of norm 5, 13 and 17; the second step doubles the first two."""
    shapes = [(2, 2), (2,)]
    weight, bias = np.float32([[3, 4], [5, 12]]), np.float32([8, 15])
    reference = Reference(shapes, "Quantile(1.0)", "unit")
    first = reference.step([weight, bias], [weight, bias])
    assert first.norm.tolist() == [5, 13, 17]
    assert first.threshold.tolist() == [math.inf] * 3
    second = reference.step([2 * weight, None], [weight, bias])
    np.testing.assert_array_equal(second.norm, [10, 26, np.nan])
    assert second.threshold.tolist() == [5, 13, 17]
    assert second.scale.tolist() == [0.5, 0.5, 1]
    assert second.gradients[0].tolist() == weight.tolist()
    assert second.gradients[1] is None
    together = Reference(shapes, "Fixed(6.5)", "global")
    assert together.step([weight / 13 * 5, bias * 0], 2 * [weight]).norm[0] == (
        pytest.approx(5 / 13 * math.hypot(5, 13))
    )


@pytest.mark.parametrize(
    ("scope", "rows"), [("parameter", 6), ("group", 1), ("global", 1), ("unit", 9)]
)
def test_the_small_model_has_rows_at_every_scope(scope, rows):
    shapes = [tuple(parameter.shape) for parameter in small_model().parameters()]
    assert len(Reference(shapes, "Fixed(1.0)", scope).rows) == rows
