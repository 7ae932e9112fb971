"""Two optimizers that step parameters of one clipper, the same ones or two parts."""

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


class Gan:
    """A generator and a critic with an optimizer each, and a clipper of both."""

    def __init__(self):
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(3, 3), nn.Linear(3, 1)
        self.generates = SGD(self.generator.parameters(), lr=1e-3)
        self.criticizes = SGD(self.critic.parameters(), lr=1e-3)
        self.clipper = NormClip(nn.ModuleList([self.generator, self.critic]), 0.1)

    def backward(self, *optimizers, set_to_none=True):
        for optimizer in optimizers or (self.generates, self.criticizes):
            optimizer.zero_grad(set_to_none)
        fake = self.generator(torch.randn(8, 3))
        (100 * self.critic(fake).square().mean()).backward()


def one_clip_in_the_generator_s_step(gan, **keywords):
    """audiolm-pytorch#256: the critic is trained without a clip."""
    gan.backward(gan.generates, **keywords)
    gan.clipper.step()
    gan.generates.step()
    gan.backward(gan.criticizes, **keywords)
    gan.criticizes.step()


def without_new_memory(gan):
    one_clip_in_the_generator_s_step(gan, set_to_none=False)


def one_clip_in_the_critic_s_step(gan):
    gan.backward()
    gan.generates.step()
    gan.backward()
    gan.clipper.step()
    gan.criticizes.step()


def a_frozen_critic_in_the_generator_s_step(gan):
    """At the clip, the critic has no gradient."""
    gan.critic.requires_grad_(False)
    gan.backward()
    gan.clipper.step()
    gan.generates.step()
    gan.critic.requires_grad_(True)
    gan.backward()
    gan.criticizes.step()


def three_steps_of_the_critic(gan):
    gan.backward()
    gan.clipper.step()
    gan.generates.step()
    for _ in range(3):
        gan.backward()
        gan.criticizes.step()


def one_clip_of_both(gan):
    gan.backward()
    gan.clipper.step()
    gan.generates.step()
    gan.criticizes.step()


def with_a_clip_in_every_third_iteration(gan):
    for _ in range(2):
        one_clip_in_the_generator_s_step(gan)
    one_clip_of_both(gan)


@pytest.mark.parametrize(
    "wrong",
    [
        one_clip_in_the_generator_s_step,
        without_new_memory,
        with_a_clip_in_every_third_iteration,
        one_clip_in_the_critic_s_step,
        a_frozen_critic_in_the_generator_s_step,
        three_steps_of_the_critic,
    ],
)
def test_an_optimizer_of_a_part_that_steps_without_a_clip_warns_once(wrong):
    gan, text = Gan(), "another optimizer steps parameters of this clipper with"
    with pytest.warns(UserWarning, match=text) as warned:
        repeat(wrong, gan)
    assert len(warned) == 1


def a_clip_before_each(gan):
    gan.backward()
    gan.clipper.step()
    gan.generates.step()
    gan.backward()
    gan.clipper.step()
    gan.criticizes.step()


def written_once_after_the_clip(gan):
    """As by a scaler that unscales the gradients of the second optimizer later."""
    gan.backward()
    gan.clipper.step()
    gan.generates.step()
    gan.critic.weight.grad.mul_(0.5)
    gan.criticizes.step()


def a_critic_that_rests(gan):
    gan.backward()
    gan.clipper.step()
    gan.generates.step()


@pytest.mark.parametrize(
    "right",
    [
        a_clip_before_each,
        one_clip_of_both,
        written_once_after_the_clip,
        a_critic_that_rests,
    ],
)
def test_optimizers_of_two_parts_may_share_a_clipper(right):
    repeat(right, Gan())


def test_a_part_that_another_clipper_clips_is_silent():
    gan = Gan()
    clipper = AGC(gan.critic, 0.01)
    for _ in range(STEPS):
        gan.backward()
        gan.clipper.step()
        gan.generates.step()
        gan.backward()
        clipper.step()
        gan.criticizes.step()


def with_a_critic_that_does_not_reach_the_generator(gan):
    gan.backward(gan.generates)
    gan.clipper.step()
    gan.generates.step()
    gan.criticizes.zero_grad()
    gan.critic(torch.randn(8, 3)).square().mean().backward()
    gan.clipper.step()
    gan.criticizes.step()


def with_one_of_three_steps_of_the_critic(gan):
    """As a delayed actor: the norm of two critics' steps has the actor's gradients."""
    for _ in range(3):
        gan.criticizes.zero_grad()
        gan.critic(torch.randn(8, 3)).square().mean().backward()
        gan.clipper.step()
        gan.criticizes.step()
    gan.backward()
    gan.clipper.step()
    gan.generates.step()


OLD = [
    with_a_critic_that_does_not_reach_the_generator,
    with_one_of_three_steps_of_the_critic,
]


@pytest.mark.parametrize("wrong", OLD)
def test_a_norm_with_gradients_of_an_earlier_step_warns_once(wrong):
    gan, text = Gan(), "measures gradients that another optimizer has used already"
    with pytest.warns(UserWarning, match=text) as warned:
        repeat(wrong, gan)
    assert len(warned) == 1


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@pytest.mark.parametrize("wrong", OLD)
def test_norms_of_each_parameter_have_no_gradients_of_others(wrong, scope):
    gan = Gan()
    model = nn.ModuleList([gan.generator, gan.critic])
    gan.clipper = NormClip(model, 0.1, scope=scope)
    repeat(wrong, gan)


def test_a_number_that_is_left_over_does_not_matter():
    """As the temperature of an actor."""
    model, temperature = nn.Linear(3, 1), nn.Parameter(torch.ones(()))
    model.temperature = temperature
    whole = SGD([model.weight, model.bias], lr=1e-3)
    cools, clipper = SGD([temperature], lr=1e-3), NormClip(model, 0.1)
    for _ in range(STEPS):
        whole.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        clipper.step()
        whole.step()
        cools.zero_grad()
        (2 * temperature).backward()
        cools.step()


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_shared_part_without_gradients_may_be_in_both_optimizers(is_frozen):
    two = TwoHeads()
    two.body.requires_grad_(not is_frozen)
    for _ in range(STEPS):
        two.zero_grad()
        x = two.body(torch.randn(8, 3)).detach()
        sum(head(x).square().mean() for head in two.heads).backward()
        for clipper, optimizer in zip(two.clippers, two.optimizers, strict=True):
            clipper.step()
            optimizer.step()


def clipped_by_other_means(gan):
    nn.utils.clip_grad_norm_(gan.critic.parameters(), 0.1)


def replaced_by_noise(gan):
    for p in gan.critic.parameters():
        p.grad = p.grad + 1e-3 * torch.randn_like(p)


@pytest.mark.parametrize("change", [clipped_by_other_means, replaced_by_noise])
def test_gradients_that_change_after_the_backward_pass_are_not_called_unclipped(change):
    gan = Gan()
    for _ in range(STEPS):
        gan.backward()
        gan.clipper.step()
        gan.generates.step()
        gan.backward()
        change(gan)
        gan.criticizes.step()
