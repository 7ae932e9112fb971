"""Two optimizers that step the same parameters, and clippers between their steps."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from autoclip_torch import AGC, NormClip

STEPS = 12


class TwoHeads:
    """A body with two heads; each head has an optimizer, which steps the body, too."""

    def __init__(self):
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.tasks = [nn.ModuleList([self.body, head]) for head in self.heads]
        self.optimizers = [SGD(task.parameters(), lr=1e-3) for task in self.tasks]
        self.clippers = [NormClip(task, 0.1) for task in self.tasks]
        self.whole = NormClip(nn.ModuleList([self.body, self.heads]), 0.1)

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def backward(self, *heads):
        x = self.body(torch.randn(8, 3))
        sum(100 * head(x).square().mean() for head in heads).backward()


def repeat(train, two):
    for _ in range(STEPS):
        train(two)


def one_backward_pass(two):
    """pytorch#56843: the second clipper measures what the first has clipped."""
    two.zero_grad()
    two.backward(*two.heads)
    for clipper, optimizer in zip(two.clippers, two.optimizers, strict=True):
        clipper.step()
        optimizer.step()


def one_backward_pass_without_new_memory(two):
    two.zero_grad(set_to_none=False)
    two.backward(*two.heads)
    for clipper, optimizer in zip(two.clippers, two.optimizers, strict=True):
        clipper.step()
        optimizer.step()


def only_the_second_is_clipped(two):
    two.zero_grad()
    two.backward(*two.heads)
    two.optimizers[0].step()
    two.clippers[1].step()
    two.optimizers[1].step()


@pytest.mark.parametrize(
    "wrong",
    [
        one_backward_pass,
        one_backward_pass_without_new_memory,
        only_the_second_is_clipped,
    ],
)
def test_a_clip_of_gradients_that_another_optimizer_has_used_warns_once(wrong):
    two = TwoHeads()
    text = r"clips gradients that another optimizer has used already.* call backward\("
    with pytest.warns(UserWarning, match=text) as warned:
        repeat(wrong, two)
    assert len(warned) == 1


def a_backward_pass_for_each(two):
    tasks = zip(two.heads, two.clippers, two.optimizers, strict=True)
    for head, clipper, optimizer in tasks:
        two.zero_grad()
        two.backward(head)
        clipper.step()
        optimizer.step()


def one_clip_before_both(two):
    two.zero_grad()
    two.backward(*two.heads)
    two.whole.step()
    for optimizer in two.optimizers:
        optimizer.step()


def both_clips_before_both(two):
    two.zero_grad()
    two.backward(*two.heads)
    for clipper in two.clippers:
        clipper.step()
    for optimizer in two.optimizers:
        optimizer.step()


def measured_after_one_step(two):
    """A dry run shows what the other optimizer has used."""
    a_backward_pass_for_each(two)
    two.whole.dry_run = True
    two.whole.step()


@pytest.mark.parametrize(
    "right",
    [
        a_backward_pass_for_each,
        one_clip_before_both,
        both_clips_before_both,
        measured_after_one_step,
    ],
)
def test_other_orders_are_silent(right):
    """A warning is an error in these tests."""
    repeat(right, TwoHeads())


def test_the_clipper_of_a_part_may_act_after_the_step_of_the_rest():
    two = TwoHeads()
    body, heads = (SGD(m.parameters(), lr=1e-3) for m in (two.body, two.heads))
    clipper = AGC(two.heads, 0.01)
    for _ in range(STEPS):
        two.zero_grad()
        two.backward(*two.heads)
        two.whole.step()
        body.step()
        clipper.step()
        heads.step()
