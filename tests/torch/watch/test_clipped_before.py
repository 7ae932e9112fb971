"""Another clip in front of the clipper is noticed by its metrics."""

import pytest
import torch

from autoclip_core import Drop, Fixed
from autoclip_torch import AGC, Clipper, NormClip, QuantileClip, TrustClip

LIMIT = 0.25


def clip_by_norm(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)


def clip_by_another_clipper(model):
    NormClip(model, LIMIT, scope="global").step()


def clip_by_an_older_spelling(model):
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for parameter in model.parameters():
        parameter.grad.mul_((LIMIT / (total + 1e-6)).clamp(max=1.0))


def clip_sometimes(model):
    if torch.rand(()) < 0.5:
        clip_by_norm(model)


def change_nothing(model):
    pass


def repeat_a_batch(model):
    for parameter in model.parameters():
        parameter.grad.fill_(LIMIT / 2)


def train(clipper_of, front, *, is_attached=True, every=1):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clipper = clipper_of(model, optimizer)
    if is_attached and isinstance(clipper, Clipper):
        clipper.attach(optimizer)
    for step in range(40):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum().backward()
        front(model)
        if not is_attached:
            clipper.step()
        optimizer.step()
        if step % every == 0:
            clipper.metrics()


CLIPPERS = {
    "one norm": lambda model, o: QuantileClip(model, scope="global"),
    "each parameter": lambda model, o: AGC(model, 1e9),
    "drop": lambda model, o: Clipper(model, Drop(Fixed(1e6)), scope="unit"),
    "TrustClip": lambda model, o: TrustClip(model, o),
}


@pytest.mark.parametrize("kind", CLIPPERS)
@pytest.mark.parametrize(
    "front",
    [clip_by_norm, clip_by_an_older_spelling, clip_by_another_clipper, clip_sometimes],
)
def test_another_clip_in_front_warns_once(kind, front):
    with pytest.warns(UserWarning, match=r"norms of 0\.25 again and again") as caught:
        train(CLIPPERS[kind], front)
    assert len(caught) == 1
    assert "let this clipper act first, or" in str(caught[0].message)


def test_it_is_noticed_in_metrics_that_are_read_rarely():
    with pytest.warns(UserWarning, match="clipped or normalized before it"):
        train(CLIPPERS["one norm"], clip_by_norm, is_attached=False, every=3)


@pytest.mark.parametrize("front", [change_nothing, repeat_a_batch])
def test_other_gradients_are_silent(front):
    """A warning is an error in these tests."""
    train(CLIPPERS["one norm"], front)


def test_a_dry_run_may_measure_what_another_clipper_left():
    train(lambda model, o: NormClip(model, 1.0, dry_run=True), clip_by_norm)
