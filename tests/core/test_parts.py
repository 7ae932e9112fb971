"""The parts of rows: their joined norms, scales and what `scale` reports, in NumPy."""

import numpy as np
import pytest

from autoclip_core import decide
from autoclip_core.clipper.parts import (
    get_part_scales,
    join_norms,
    join_observed,
    measure_scale,
)

from ..support.scale_only import POLICIES, ROWS, SCALED, expect, make_series


def norms_of(grads, rows, count):
    """Return the norms of the parts, and which parts have a gradient."""
    squares, observed = np.zeros(2 * count), np.zeros(2 * count, bool)
    for name, grad in grads.items():
        if grad is not None:
            index = rows[name] + (0 if name in SCALED else count)
            np.add.at(squares, index, np.square(np.float64(grad)))
            observed[index] = True
    return np.sqrt(squares), observed


@pytest.mark.parametrize("nonfinite", ["zero", "propagate", "skip"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("scope", ROWS)
def test_only_the_first_part_is_scaled_unless_the_row_is_removed(
    scope, name, nonfinite
):
    policy, rows = POLICIES[name], ROWS[scope]
    count = 1 + max(part.max() for part in rows.values())
    for grads in make_series():
        norms, observed = norms_of(grads, rows, count)
        whole, is_observed = join_norms(norms), join_observed(observed)
        np.testing.assert_allclose(
            whole, np.hypot(norms[:count], norms[count:]), rtol=1e-7
        )
        _, decision = decide(
            policy[0],
            policy[0].init(count),
            whole,
            observed=is_observed,
            nonfinite=nonfinite,
        )
        after, _, _ = expect(grads, rows, policy, nonfinite)
        wanted, _ = norms_of(after or {}, rows, count)
        finite = np.isfinite(whole)
        scales = get_part_scales(decision)
        known = np.tile(finite, 2)
        assert scales.shape == (2 * count,)
        scaled = norms[known] * scales[known]
        np.testing.assert_allclose(scaled, wanted[known], rtol=1e-6)
        measured = measure_scale(decision, norms)
        assert measured.scale.dtype == np.float32
        assert (measured.scale <= 1).all()
        np.testing.assert_allclose(
            whole[finite] * measured.scale[finite],
            join_norms(wanted)[finite],
            rtol=1e-6,
        )
        assert (measured.scale[~finite] == decision.scale[~finite]).all()
