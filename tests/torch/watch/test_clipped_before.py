"""Another clip in front of the clipper is noticed by its metrics."""

import pytest
import torch

from autoclip_core import ClipLog, Drop, Fixed
from autoclip_core.clipper.metrics_checks import find_repeated_limit
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


def log_second(front_of, *, is_attached):
    """Return the log of a clipper that a limit in front acts before."""
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 1)
    optimizer, others = (torch.optim.SGD(m.parameters(), 1e-3) for m in (model, other))
    front = front_of(model, other)
    clippers = [front, QuantileClip(model, scope="global")]
    if is_attached:
        for each in clippers:
            each.attach(optimizer)
    log = ClipLog()
    for _ in range(40):
        optimizer.zero_grad()
        others.zero_grad()
        other(torch.randn(8, 3)).square().sum().backward()
        model(torch.randn(8, 3)).square().sum().backward()
        if front.dry_run or front.parameters[0] is not model.weight:
            clip_by_norm(model)
        if not is_attached:
            for each in clippers:
                each.step()
        optimizer.step()
        others.step()
        log.record(clippers[1].metrics())
    return log


def has_light(log):
    return "0.25 again and again" in " ".join(log.summary().advice)


@pytest.mark.parametrize("is_attached", [False, True])
def test_the_log_of_a_clipper_behind_another_of_ours_has_no_red_light(is_attached):
    log = log_second(lambda model, _: NormClip(model, LIMIT), is_attached=is_attached)
    assert find_repeated_limit(log.norms.tolist()) == LIMIT
    assert not has_light(log)


@pytest.mark.parametrize(
    "front_of",
    [
        lambda model, other: NormClip(model, LIMIT, dry_run=True),
        lambda model, other: NormClip(other, LIMIT),
    ],
    ids=["a dry run", "other parameters"],
)
def test_a_clipper_that_does_not_clip_the_same_hides_no_other_clip(front_of):
    with pytest.warns(UserWarning, match="clipped or normalized before it"):
        log = log_second(front_of, is_attached=False)
    assert has_light(log)
