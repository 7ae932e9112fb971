"""An optimizer takes the place of the one that a clipper is attached to."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD

from autoclip_core import Fixed
from autoclip_torch import Clipper, NormClip, TrustClip, UpdateClipper


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def attach(model, optimizer):
    clipper = NormClip(model, max_norm=1.0)
    clipper.attach(optimizer)
    return clipper


KINDS = {
    "Clipper": attach,
    "UpdateClipper": lambda model, o: UpdateClipper(model, o, Fixed(1.0)),
    "TrustClip": TrustClip,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_kept", [False, True], ids=["deleted", "kept"])
def test_a_swapped_optimizer_warns_once(kind, is_kept):
    model = network()
    first = SGD(model.parameters(), lr=0.1)
    clipper = KINDS[kind](model, first)
    step(model, first)
    if not is_kept:
        del first
    second = torch.optim.AdamW(model.parameters())
    if is_kept:  # one of the two may call the other one
        step(model, second)
    with pytest.warns(UserWarning, match=r"AdamW stepped .* such as weight, but"):
        step(model, second)
    step(model, second)
    assert clipper.names


class Outer(torch.optim.Optimizer):
    """Steps another optimizer of the same parameters, as SAM and Lookahead do."""

    def __init__(self, inner, calls=2):
        super().__init__(inner.param_groups, {})
        self.inner, self.calls = inner, calls

    def step(self, closure=None):
        for _ in range(self.calls):
            self.inner.step()


def detached(model, first, clipper):
    clipper.detach()
    return [SGD(model.parameters(), lr=0.1)] * 3


def attached_again(model, first, clipper):
    clipper.detach()
    second = SGD(model.parameters(), lr=0.1)
    clipper.attach(second)
    return [second] * 3


def inside(model, first, clipper):
    """The clipper is attached to the inner optimizer."""
    return [Outer(first)] * 3


def outside(model, first, clipper):
    """The clipper is attached to the outer optimizer."""
    clipper.detach()
    outer = Outer(first)
    clipper.attach(outer)
    return [outer] * 3


def with_another_clipper(model, first, clipper):
    second = SGD(model.parameters(), lr=0.1)
    NormClip(model, max_norm=1.0).attach(second)
    return [second] * 3


def of_other_parameters(model, first, clipper):
    return [SGD(network().parameters(), lr=0.1)] * 3


@pytest.mark.parametrize(
    "optimizers",
    [
        detached,
        attached_again,
        inside,
        outside,
        with_another_clipper,
        of_other_parameters,
    ],
)
def test_other_optimizers_do_not_warn(optimizers):
    model = network()
    first = SGD(model.parameters(), lr=0.1)
    clipper = attach(model, first)
    step(model, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers(model, first, clipper):
            step(model, optimizer)


def test_a_clipper_that_steps_by_hand_later_does_not_warn():
    model = network()
    first = SGD(model.parameters(), lr=0.1)
    clipper = Clipper(model, Fixed(1.0))
    clipper.attach(first)
    step(model, first)
    del first
    second = SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            clipper.step()
            step(model, second)
