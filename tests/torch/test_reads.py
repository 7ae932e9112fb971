"""The probes of `support/torch_device.py` notice every read of a value."""

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
