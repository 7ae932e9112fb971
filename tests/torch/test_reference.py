"""What the tests of torch rely on: the reference clipper, and probes that notice reads.

The reference agrees with a calculation by hand. The probes of `support/torch_device.py`
notice every read of a value.
"""

import math

import numpy as np
import pytest
import torch

from autoclip_torch import NormClip
from autoclip_torch.step.stepper import Stepper

from ..support.torch_device import (
    HostReadError,
    NoCopies,
    looks_counted,
    nothing_read,
    watched,
)
from ..support.torch_gradients import parameter
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


# The probes.

LOOKS = {
    "item": lambda t: t.item(),
    "bool": lambda t: bool(t),
    "branch": lambda t: 1 if t > 0 else 0,
    "float": lambda t: float(t),
    "int": lambda t: int(t),
    "index": lambda t: [1, 2][t.long()],
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "array": lambda t: np.asarray(t),
    "cpu": lambda t: t.cpu(),
    "format": lambda t: f"{t}",
    "nonzero": lambda t: t.nonzero(),
    "equal": lambda t: torch.equal(t, t),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=list(LOOKS))
def test_the_probe_detects_a_read(look):
    with pytest.raises(HostReadError):
        look(watched(torch.tensor(0.0)))
    with pytest.raises(HostReadError), nothing_read():
        look(torch.tensor(0.0))
    with looks_counted() as looks:
        look(watched(torch.tensor(0.0)))
    assert looks
    look(torch.tensor(0.0))  # the read itself works


def test_the_probe_detects_an_index_by_booleans():
    t = torch.ones(3)
    for index in (lambda: t[t > 0], lambda: t.__setitem__(t > 0, t)):
        with pytest.raises(HostReadError), nothing_read():
            index()


def test_a_step_that_reads_is_detected():
    """The control of `test_device.py`: one `if` on the decision raises."""

    class CuriousStepper(Stepper):
        def decide(self, *arguments, **keywords):
            decision = super().decide(*arguments, **keywords)
            assert decision.finite.any()
            return decision

    class Curious(NormClip):
        _stepper_class = CuriousStepper

    p = parameter(watched(torch.tensor([3.0, 4.0])))
    with pytest.raises(HostReadError, match="__bool__"):
        Curious([p], max_norm=1.0).step()
    with nothing_read():
        NormClip([p], max_norm=1.0).step()


def test_the_probe_detects_a_copy_between_devices():
    for copy in (
        lambda: torch.zeros(3).to("meta"),
        lambda: torch.zeros(3, device="meta").copy_(torch.zeros(3)),
        lambda: torch.asarray(np.zeros(3, np.float32), device="meta"),
    ):
        with pytest.raises(HostReadError, match="between devices"), NoCopies():
            copy()
