"""An engine steps flat tensors in place of the parameters, as DeepSpeed's ZeRO does.

`tests/trainers/test_engines.py` runs the engine.
"""

import pytest
import torch
from torch import distributed, nn
from torch.optim import SGD

from autoclip_core import Fixed
from autoclip_torch import Clipper, NormClip, TrustClip, UpdateClipper

LIMIT = 1e-3


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def attach(model, optimizer):
    Clipper(model, Fixed(LIMIT)).attach(optimizer)
    return optimizer


WAYS = {
    "attach": attach,
    "as_optimizer": lambda m, o: Clipper.as_optimizer(o, Fixed(LIMIT)),
    "UpdateClipper": lambda m, o: UpdateClipper(m, o, Fixed(LIMIT)) and o,
    "TrustClip": lambda m, o: TrustClip(m, o) and o,
}


def flatten(model, optimizer):
    """Replace the parameters of the optimizer, with gradients of the norm 5."""
    parts = [p.detach().flatten() for p in model.parameters()]
    flat = torch.cat(parts).requires_grad_()
    flat.grad = torch.zeros_like(flat)
    flat.grad[:2] = torch.tensor([3.0, 4.0])
    optimizer.param_groups[0]["params"] = [flat]
    return flat


@pytest.mark.parametrize("way", WAYS)
def test_flat_parts_are_refused(way):
    model = network()
    optimizer = WAYS[way](model, SGD(model.parameters(), lr=0.1))
    flat = flatten(model, optimizer)
    before = flat.detach().clone()
    with pytest.raises(ValueError, match=r"engine that flattens .* the threshold\(\)"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_a_clipper_is_not_attached_to_flat_parts():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    flatten(model, optimizer)
    with pytest.raises(ValueError, match="engine that flattens them"):
        NormClip(model, LIMIT).attach(optimizer)


def test_one_process_may_flatten_what_is_one_row():
    model = network()
    optimizer = NormClip.as_optimizer(SGD(model.parameters(), lr=0.1), LIMIT)
    flat = flatten(model, optimizer)
    optimizer.step()
    assert flat.grad.norm().item() == pytest.approx(LIMIT)


@pytest.fixture
def one_rank():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_ranks_that_are_said_to_hold_parts_may_flatten(one_rank):
    model = network()
    optimizer = Clipper.as_optimizer(
        SGD(model.parameters(), lr=0.1), Fixed(LIMIT), process_group=one_rank
    )
    flat = flatten(model, optimizer)
    optimizer.step()
    assert flat.grad.norm().item() == pytest.approx(LIMIT)


def test_other_parameters_of_one_axis_are_followed():
    model = network()
    optimizer = Clipper.as_optimizer(SGD([model.weight], lr=0.1), Fixed(LIMIT))
    optimizer.param_groups[0]["params"] = [model.bias]
    model.bias.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert model.bias.grad.norm().item() == pytest.approx(LIMIT)
