"""A clip before the step of an optimizer that has other parameters, and no clipper."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD

from autoclip_core import Fixed
from autoclip_torch import Clipper, NormClip, QuantileClip

STEPS = 40


class Gan:
    """Two networks, each with an optimizer; the clipper is that of the critic."""

    def __init__(self, **keywords):
        torch.manual_seed(0)
        self.generator = nn.Linear(3, 4)
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.generates = SGD(self.generator.parameters(), lr=1e-3)
        self.criticizes = SGD(self.critic.parameters(), lr=1e-3)
        self.clipper = NormClip(self.critic, 0.5, scope="global", **keywords)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        self.count = itertools.count(1)

    def zero_grad(self, set_to_none=True):
        self.generates.zero_grad(set_to_none)
        self.criticizes.zero_grad(set_to_none)

    def backward(self, scale=1.0):
        loss = self.critic(self.generator(torch.randn(8, 3))).square().mean()
        (scale * loss).backward()

    def criticize(self, set_to_none=True):
        """Train the critic, with a clip."""
        self.criticizes.zero_grad(set_to_none)
        self.backward()
        self.clipper.step()
        self.criticizes.step()

    def generate(self):
        """Train the generator, without a clip."""
        self.generates.zero_grad()
        self.backward()
        self.generates.step()


def repeat(train, gan, times=STEPS):
    for _ in range(times):
        train(gan)


def before_both_optimizers(gan):
    gan.criticize()
    gan.generates.zero_grad()
    gan.backward()
    gan.clipper.step()
    gan.generates.step()


def without_new_memory(gan):
    gan.criticize(set_to_none=False)
    gan.zero_grad(set_to_none=False)
    gan.backward()
    gan.clipper.step()
    gan.generates.step()


def in_some_iterations(gan):
    gan.criticize()
    if next(gan.count) % 3 == 0:
        before_both_optimizers(gan)


def with_three_steps_of_the_generator(gan):
    gan.criticize()
    for _ in range(3):
        gan.zero_grad()
        gan.backward()
        gan.clipper.step()
        gan.generates.step()


def by_turns(gan):
    gan.zero_grad()
    gan.backward()
    gan.clipper.step()
    (gan.generates if next(gan.count) % 2 else gan.criticizes).step()


def with_a_scaler(gan):
    for optimizer in (gan.criticizes, gan.generates):
        gan.zero_grad()
        gan.scaler.scale(torch.ones(()))
        gan.backward(scale=gan.scaler.get_scale())
        gan.scaler.unscale_(gan.criticizes)
        if optimizer is gan.generates:
            gan.scaler.unscale_(optimizer)
        gan.clipper.step()
        gan.scaler.step(optimizer)
        gan.scaler.update()


def with_a_frozen_critic(gan):
    """The clip before the generator's step finds no gradient."""
    gan.criticize()
    gan.zero_grad()
    generate_with_a_frozen_critic(gan)


def with_old_gradients_of_a_frozen_critic(gan):
    """The clip finds the gradients of the step before. The critic steps unclipped."""
    gan.criticizes.zero_grad()
    gan.backward()
    gan.criticizes.step()
    gan.generates.zero_grad()
    generate_with_a_frozen_critic(gan)


def generate_with_a_frozen_critic(gan):
    gan.critic.requires_grad_(False)
    gan.backward()
    gan.clipper.step()
    gan.generates.step()
    gan.critic.requires_grad_(True)


WRONG = [
    *(before_both_optimizers, without_new_memory, in_some_iterations, by_turns),
    *(with_three_steps_of_the_generator, with_a_scaler, with_a_frozen_critic),
    with_old_gradients_of_a_frozen_critic,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: each.__name__)
def test_an_optimizer_that_steps_unclipped_after_clips_of_others_warns_once(wrong):
    gan = Gan()
    text = r"no effect before SGD.step\(\), which steps other .* of shape \(4, 3\)"
    with pytest.warns(UserWarning, match=text) as warned:
        repeat(wrong, gan)
    assert len(warned) == 1
    assert "make a clipper of what this SGD steps" in str(warned[0].message)
    assert "leave the call before it out" in str(warned[0].message)


def test_the_parameters_may_come_from_the_optimizer():
    gan = Gan()
    gan.clipper = QuantileClip(gan.criticizes, quantile=0.5)
    with pytest.warns(UserWarning, match="no effect before SGD.step"):
        repeat(before_both_optimizers, gan)


def test_the_way_out_is_silent():
    gan = Gan()
    clipper = NormClip(gan.generator, 0.5)
    for _ in range(STEPS):
        gan.criticize()
        gan.zero_grad()
        gan.backward()
        clipper.step()
        gan.generates.step()


def only_the_critic(gan):
    gan.criticize()
    gan.generate()


def five_steps_of_the_critic(gan):
    for _ in range(5):
        gan.criticize()
    gan.generate()


def only_measured_before_the_generator(gan):
    gan.criticize()
    gan.zero_grad()
    gan.backward()
    gan.clipper.dry_run = True
    gan.clipper.step()
    gan.clipper.dry_run = False
    gan.generates.step()


def evaluated_before_the_generator(gan):
    """The clip measures a batch that is not trained."""
    gan.criticize()
    gan.criticizes.zero_grad()
    gan.backward()
    gan.clipper.step()
    gan.zero_grad()
    gan.backward()
    gan.generates.step()


def evaluated_between_two_iterations(gan):
    only_the_critic(gan)
    gan.zero_grad()
    gan.backward()
    gan.clipper.step()


def delayed_actor(gan):
    """The critic's optimizer steps in every second iteration only."""
    gan.zero_grad()
    gan.backward()
    gan.clipper.step()
    gan.generates.step()
    if next(gan.count) % 2:
        gan.criticizes.step()


def overflows(gan, by_hand=True):
    """The scaler leaves out each second update of the critic, and all at the start."""
    step = next(gan.count)
    is_overflow = step < 17 or step % 2
    gan.zero_grad()
    gan.scaler.scale(torch.ones(()))
    gan.backward(scale=gan.scaler.get_scale())
    if is_overflow:
        gan.critic[0].weight.grad.fill_(float("inf"))
    if by_hand:
        gan.scaler.unscale_(gan.criticizes)
        gan.clipper.step()
    else:
        gan.clipper.step(scaler=gan.scaler, optimizer=gan.criticizes)
    if is_overflow:
        gan.scaler.step(gan.criticizes)
        gan.generates.step()
    else:
        gan.scaler.step(gan.criticizes)
    gan.scaler.update()


def overflows_that_the_clipper_unscales(gan):
    overflows(gan, by_hand=False)


def nan_in_every_second_step(gan):
    gan.zero_grad()
    gan.backward()
    is_bad = next(gan.count) % 2 == 0
    if is_bad:
        gan.critic[0].weight.grad.fill_(float("nan"))
    gan.clipper.step()
    (gan.generates if is_bad else gan.criticizes).step()


def clipped_by_other_means(gan):
    gan.criticize()
    gan.zero_grad()
    gan.backward()
    gan.clipper.step()
    nn.utils.clip_grad_norm_(gan.generator.parameters(), 1e-3)
    gan.generates.step()


def no_gradient_of_the_other(gan):
    """As an optimizer that averages weights."""
    gan.criticize()
    gan.zero_grad()
    gan.backward()
    gan.generates.zero_grad()
    gan.clipper.step()
    gan.generates.step()


RIGHT = [
    *(only_the_critic, five_steps_of_the_critic, only_measured_before_the_generator),
    *(evaluated_before_the_generator, evaluated_between_two_iterations),
    *(delayed_actor, overflows_that_the_clipper_unscales, clipped_by_other_means),
    no_gradient_of_the_other,
]


@pytest.mark.parametrize("right", RIGHT, ids=lambda each: each.__name__)
def test_a_right_loop_is_silent(right):
    """A warning is an error in these tests."""
    repeat(right, Gan())


@pytest.mark.filterwarnings("ignore:the gradients of .* were not finite")
@pytest.mark.parametrize("right", [overflows, nan_in_every_second_step])
@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
def test_clips_of_gradients_that_are_not_finite_do_not_count(right, nonfinite):
    repeat(right, Gan(nonfinite=nonfinite))


def test_clips_that_a_loss_policy_skips_do_not_count():
    gan = Gan(loss_policy=Fixed(1.0))
    for step in range(STEPS):
        gan.zero_grad()
        gan.backward()
        gan.clipper.step(loss=torch.tensor(2.0 * (step % 2)))
        (gan.generates if step % 2 else gan.criticizes).step()


def test_an_actor_and_a_critic_with_a_clipper_each_are_silent():
    gan = Gan()
    clipper = Clipper(gan.generator, Fixed(0.5))
    for step in range(STEPS):
        gan.zero_grad()
        gan.backward()
        gan.clipper.step()
        clipper.step()
        gan.generates.step()
        if step % 2:
            gan.criticizes.step()


def test_clippers_that_share_parameters_are_silent():
    gan = Gan()
    gan.backward()
    other = NormClip(gan.critic[2], 0.5)
    other.step()
    repeat(before_both_optimizers, gan)


def test_a_clip_in_a_closure_is_used():
    gan = Gan()
    gan.criticizes = LBFGS(gan.critic.parameters(), line_search_fn="strong_wolfe")

    def closure():
        gan.zero_grad()
        loss = gan.critic(gan.generator(torch.ones(8, 3))).square().mean()
        loss.backward()
        gan.clipper.step()
        return loss

    for _ in range(STEPS):
        gan.criticizes.step(closure)
        gan.generates.step()


def test_each_clipped_micro_batch_is_another_warning():
    gan = Gan()

    def train(gan):
        gan.criticizes.zero_grad()
        for _ in range(4):
            gan.generates.zero_grad()
            gan.backward()
            gan.clipper.step()
            gan.generates.step()
        gan.criticizes.step()

    with pytest.warns(UserWarning, match="several times before each") as warned:
        repeat(train, gan)
    assert len(warned) == 1


def test_a_copied_clipper_starts_again():
    gan = Gan()
    repeat(before_both_optimizers, gan, 5)
    repeat(before_both_optimizers, copy.deepcopy(gan), 4)
