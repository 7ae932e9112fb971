"""At which place of a training loop a clipper by hand steps: wrong orders are noticed,
and unusual loops that are right stay silent.
"""

import copy
import importlib.util
import itertools
import warnings

import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoclip_torch import NormClip, QuantileClip
from autoclip_torch.optimizer_steps.global_hook import (
    GlobalHook,
    list_hooks,
    list_owners,
)

SGD = torch.optim.SGD
STEPS = 15  # gradients are compared in 12


class Loop:
    """A model of two weights, whose gradient has the norm 5 after a backward pass."""

    def __init__(self, **keywords):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(2, 1, bias=False)
        self.optimizer = SGD(self.model.parameters(), lr=0.01)
        self.twin = copy.deepcopy(self.model)
        self.twin_optimizer = SGD(self.twin.parameters(), lr=0.01)
        self.clipper = NormClip(self.model, max_norm=1.0, scope="global", **keywords)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        self.norms, self.scales = [], itertools.count(1)

    def backward(self, scale=1.0):
        self.scaler.scale(torch.ones(()))  # it creates the scale
        (scale * self.model(torch.tensor([[3.0, 4.0]])).sum()).backward()

    def update(self):
        self.norms.append(self.model.weight.grad.norm().item())
        self.optimizer.step()


def repeat(each, loop, times=STEPS):
    for _ in range(times):
        each(loop)


def after_the_step(loop):
    loop.backward()
    loop.update()
    loop.clipper.step()
    loop.optimizer.zero_grad()


def before_the_backward_pass(loop):
    """The gradients are those of the step before, set to 0 later."""
    if loop.model.weight.grad is None:
        loop.backward()
    loop.clipper.step()
    loop.optimizer.zero_grad(set_to_none=False)
    loop.backward()
    loop.update()


def in_each_micro_batch(loop):
    for _ in range(3):
        loop.backward()
        loop.clipper.step()
    loop.update()
    loop.optimizer.zero_grad(set_to_none=False)


def twice(loop):
    loop.optimizer.zero_grad()
    loop.backward()
    loop.clipper.step()
    loop.clipper.step()
    loop.update()


def scaled(loop):
    loop.optimizer.zero_grad()
    loop.backward(scale=64.0)
    loop.clipper.step()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


class Scaler(torch.amp.GradScaler):
    """A scaler whose `step` does not call that of torch."""

    def step(self, opt):
        if self._per_optimizer_states[id(opt)]["stage"].name == "READY":
            self.unscale_(opt)
        opt.step()


def scaled_by_a_subclass(loop):
    loop.scaler.__class__ = Scaler
    scaled(loop)


def between_two_backward_passes(loop):
    loop.optimizer.zero_grad()
    loop.backward()
    loop.clipper.step()
    loop.backward()
    loop.update()


def in_the_first_micro_batch(loop):
    """The loop counts from 0 in one place, and from 1 in the other."""
    for batch in range(4):
        loop.backward()
        if batch % 4 == 0:
            loop.clipper.step()
        if (batch + 1) % 4 == 0:
            loop.update()
            loop.optimizer.zero_grad()


def before_a_closure(loop):
    """The closure computes the gradients of the update."""

    def closure():
        loop.optimizer.zero_grad()
        loop.backward()

    closure()
    loop.clipper.step()
    loop.optimizer.step(closure)


def divided_after_the_clip(loop):
    """As the mean of accumulated gradients, and a loss scale by hand."""
    loop.optimizer.zero_grad()
    loop.backward(scale=next(loop.scales))
    loop.clipper.step()
    loop.model.weight.grad.data.div_(4)
    loop.optimizer.step()


def replaced_by_a_multiple(loop):
    loop.optimizer.zero_grad()
    loop.backward(scale=next(loop.scales))
    loop.clipper.step()
    loop.model.weight.grad = 64 * loop.model.weight.grad
    loop.optimizer.step()


def replaced_by_what_was_not_clipped(loop):
    loop.optimizer.zero_grad()
    loop.backward(scale=next(loop.scales))
    before = loop.model.weight.grad.clone()
    loop.clipper.step()
    loop.model.weight.grad = before
    loop.optimizer.step()


def left_out_in_some_steps(loop):
    """As after the last batch of an epoch."""
    for step in range(4):
        loop.optimizer.zero_grad()
        loop.backward()
        if step != 3:
            loop.clipper.step()
        loop.update()


WRONG = {
    left_out_in_some_steps: "in some steps without clipper.step",
    divided_after_the_clip: "were multiplied by 0.25 between",
    replaced_by_a_multiple: "were multiplied by 64 between",
    replaced_by_what_was_not_clipped: r"grew between clipper.step\(\) and",
    before_a_closure: r"no effect: the closure of optimizer.step\(\) computes",
    after_the_step: r"after the last backward\(\)",
    before_the_backward_pass: r"after the last backward\(\)",
    between_two_backward_passes: r"after the last backward\(\)",
    in_the_first_micro_batch: r"after the last backward\(\)",
    in_each_micro_batch: r"several times before each optimizer.step\(\)",
    twice: r"several times before each optimizer.step\(\)",
    scaled: "multiplied by the loss scale",
    scaled_by_a_subclass: "multiplied by the loss scale",
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: each.__name__)
def test_a_wrong_order_warns_once(wrong, fused):
    loop = Loop()
    loop.optimizer = SGD(loop.model.parameters(), lr=0.01, fused=fused)
    with pytest.warns(UserWarning, match=WRONG[wrong]) as warned:
        repeat(wrong, loop)
    assert len(warned) == 1
    assert warned[0].filename == __file__


def right(loop):
    loop.optimizer.zero_grad()
    loop.backward()
    loop.clipper.step()
    loop.update()


def right_without_new_memory(loop):
    loop.backward()
    loop.clipper.step()
    loop.update()
    loop.optimizer.zero_grad(set_to_none=False)


def accumulation(loop):
    for _ in range(3):
        loop.backward(scale=1 / 3)
    right_without_new_memory(loop)


def two_clippers(loop):
    loop.backward()
    QuantileClip(loop.model).step()
    loop.clipper.step()
    loop.update()
    loop.optimizer.zero_grad()


def left_out_batches(loop):
    """As a loop that skips a batch, and as a scaler that skips updates."""
    for _ in range(3):
        loop.backward()
        loop.clipper.step()
        loop.optimizer.zero_grad(set_to_none=False)
    right_without_new_memory(loop)


def two_phases_without_a_clip(loop):
    """On purpose, before and after other phases."""
    phase = next(loop.scales) // 5
    for _ in range(5):
        loop.optimizer.zero_grad()
        loop.backward()
        if phase == 1:
            loop.clipper.step()
        loop.optimizer.step()


def two_optimizers_of_one_clipper(loop):
    loop.backward()
    loop.clipper.step()
    loop.update()
    loop.update()
    loop.optimizer.zero_grad()


def noise_after_the_clip(loop):
    loop.backward()
    loop.clipper.step()
    loop.model.weight.grad += 1e-3
    loop.optimizer.step()
    loop.optimizer.zero_grad(set_to_none=False)


def strong_noise_after_the_clip(loop):
    loop.optimizer.zero_grad()
    loop.backward()
    loop.clipper.step()
    loop.model.weight.grad = loop.model.weight.grad + 3 * torch.randn(1, 2)
    loop.optimizer.step()


def zeros_after_the_clip(loop):
    loop.optimizer.zero_grad()
    loop.backward()
    loop.clipper.step()
    loop.model.weight.grad[:, next(loop.scales) % 2] = 0.0
    loop.optimizer.step()


def no_gradient_after_the_clip(loop):
    loop.optimizer.zero_grad()
    loop.backward()
    loop.clipper.step()
    loop.model.weight.grad = None
    loop.optimizer.step()


def a_second_clip(loop):
    """Of a smaller norm, in every second step."""
    loop.optimizer.zero_grad()
    loop.backward(scale=0.1 + 0.2 * (next(loop.scales) % 2))
    loop.clipper.step()
    torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)
    loop.optimizer.step()


def unscaled_by_hand(loop):
    loop.optimizer.zero_grad()
    for _ in range(2):
        loop.backward(scale=32.0)
    loop.scaler.unscale_(loop.optimizer)
    assert loop.clipper.step().norm.item() == pytest.approx(5.0)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def unscaled_by_the_clipper(loop):
    loop.optimizer.zero_grad()
    loop.backward(scale=64.0)
    loop.clipper.step(scaler=loop.scaler, optimizer=loop.optimizer)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def unscaled_by_a_subclass(loop):
    loop.scaler.__class__ = Scaler
    unscaled_by_the_clipper(loop)


def half_of_the_steps_scaled(loop):
    unscaled_by_the_clipper(loop)
    right(loop)


def left_out_by_the_scaler_beside_a_twin(loop, by_hand=False):
    """Another network of the same shapes is trained without a scaler.

    A clipper without the scaler warns that these gradients are not finite.
    """
    loop.optimizer.zero_grad()
    loop.twin_optimizer.zero_grad()
    loop.backward(scale=float("inf"))
    loop.twin(torch.ones(1, 2)).sum().backward()
    if by_hand:
        loop.scaler.unscale_(loop.optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the gradients of 10 of the last 10")
            loop.clipper.step()
    else:
        loop.clipper.step(scaler=loop.scaler, optimizer=loop.optimizer)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    loop.twin_optimizer.step()


def unscaled_by_hand_beside_a_twin(loop):
    left_out_by_the_scaler_beside_a_twin(loop, by_hand=True)


def in_a_closure(loop):
    def closure():
        loop.optimizer.zero_grad()
        loop.backward()
        loop.clipper.step()

    loop.optimizer.step(closure=closure)


def before_a_closure_without_gradients(loop):
    """As the manual optimization of Lightning."""
    loop.optimizer.zero_grad()
    loop.backward()
    loop.clipper.step()
    loop.optimizer.step(lambda: None)


DISABLED = torch.amp.GradScaler("cpu", enabled=False)


def a_disabled_scaler(loop):
    loop.optimizer.zero_grad()
    loop.backward()
    DISABLED.unscale_(loop.optimizer)
    loop.clipper.step()
    DISABLED.step(loop.optimizer)
    DISABLED.update()


def frozen_in_the_next_step(loop):
    """As a GAN whose networks are frozen by turns."""
    right(loop)
    loop.model.requires_grad_(False)
    loop.clipper.step()
    loop.model.requires_grad_(True)


RIGHT = [
    *(right, right_without_new_memory, accumulation, two_clippers, left_out_batches),
    *(two_optimizers_of_one_clipper, noise_after_the_clip, unscaled_by_hand),
    *(strong_noise_after_the_clip, zeros_after_the_clip, no_gradient_after_the_clip),
    *(a_second_clip, unscaled_by_a_subclass, two_phases_without_a_clip),
    *(unscaled_by_the_clipper, half_of_the_steps_scaled, a_disabled_scaler),
    *(left_out_by_the_scaler_beside_a_twin, frozen_in_the_next_step, in_a_closure),
    *(unscaled_by_hand_beside_a_twin, before_a_closure_without_gradients),
]


@pytest.mark.parametrize("times", [STEPS, 150])
@pytest.mark.parametrize("each", RIGHT, ids=lambda each: each.__name__)
def test_a_right_order_is_silent(each, times):
    """A warning is an error in these tests."""
    loop = Loop()
    repeat(each, loop, times)
    assert loop.norms == pytest.approx([1.0] * len(loop.norms))


@pytest.mark.parametrize("wrong", [after_the_step, in_each_micro_batch])
def test_a_dry_run_measures_anywhere(wrong):
    repeat(wrong, Loop(dry_run=True))


def by_scaler(loop):
    loop.clipper.step(scaler=loop.scaler, optimizer=loop.optimizer)


def by_another_scaler(loop):
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    other.scale(torch.ones(()))
    loop.clipper.step(scaler=other, optimizer=loop.optimizer)


def plainly(loop):
    loop.clipper.step()


def by_unscale(loop):
    loop.scaler.unscale_(loop.optimizer)
    loop.clipper.step()


SPELLINGS = [
    (by_scaler, by_scaler),
    (by_scaler, plainly),
    (by_scaler, by_another_scaler),
    (by_unscale, plainly),
    (by_unscale, by_scaler),
]


@pytest.mark.parametrize(("first", "second"), SPELLINGS)
def test_a_second_clip_between_two_updates_of_a_scaler_is_refused(first, second):
    loop = Loop()
    unscaled_by_hand(loop)  # from this update on, the clipper knows the scaler
    loop.backward(scale=64.0)
    first(loop)
    with pytest.raises(RuntimeError, match=r"once before scaler.update\(\), got a sec"):
        second(loop)
    loop.optimizer.zero_grad()
    loop.scaler.update()
    unscaled_by_the_clipper(loop)


def test_a_clip_between_the_scaler_s_step_and_its_update_is_refused():
    loop = Loop()
    unscaled_by_hand(loop)
    loop.backward(scale=64.0)
    loop.scaler.step(loop.optimizer)
    with pytest.raises(RuntimeError, match="must be called before"):
        loop.clipper.step()


def divided_in_place(loop):
    """Unlike `gradient.data`, this changes the version number of the gradient."""
    loop.optimizer.zero_grad()
    loop.backward(scale=next(loop.scales))
    loop.clipper.step()
    loop.model.weight.grad /= 4
    loop.optimizer.step()


LATER = {
    divided_after_the_clip: WRONG[divided_after_the_clip],
    **{each: WRONG[each] for each in (between_two_backward_passes, after_the_step)},
    replaced_by_a_multiple: WRONG[replaced_by_a_multiple],
    divided_in_place: "were multiplied by 0.25 between",
}


@pytest.mark.parametrize("wrong", LATER, ids=lambda each: each.__name__)
def test_a_wrong_order_that_begins_with_another_optimizer_warns_once(wrong):
    loop = Loop()
    repeat(right, loop, 30)
    loop.optimizer = SGD(loop.model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=LATER[wrong]) as warned:
        repeat(wrong, loop, 30)
    assert len(warned) == 1


@pytest.mark.parametrize(("start", "most"), [(30, 90), (250, 20)])
@pytest.mark.parametrize("wrong", LATER, ids=lambda each: each.__name__)
def test_a_wrong_order_that_begins_later_warns_once(wrong, start, most):
    """What writes no new version is seen in every 400th step only."""
    if wrong is divided_after_the_clip:
        most = 400
    loop = Loop()
    repeat(right, loop, start)
    with pytest.warns(UserWarning, match=LATER[wrong]) as warned:
        repeat(wrong, loop, most)
    assert len(warned) == 1


def test_a_copied_clipper_starts_without_a_loop():
    loop = Loop()
    with pytest.warns(UserWarning, match="multiplied"):
        repeat(scaled, loop, 2)
    loop.model, loop.clipper = copy.deepcopy((loop.model, loop.clipper))
    loop.optimizer = SGD(loop.model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="multiplied"):
        repeat(scaled, loop, 2)


def list_tables():
    before = torch_optimizer._global_optimizer_pre_hooks
    return before, torch_optimizer._global_optimizer_post_hooks


def count_global_hooks():
    return sum(len(table) + len(list_hooks(table)) for table in list_tables())


def test_a_clipper_has_one_global_hook_until_the_next_one_does():
    spec = importlib.util.find_spec("autoclip_torch.loop.loop_check")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    right(Loop())
    count = count_global_hooks()
    loop = Loop()
    handle = loop.clipper.attach(loop.optimizer)
    loop.backward()
    loop.update()
    assert count_global_hooks() == count + 1  # that of `SwapCheck`
    assert list_owners(list_tables()[0]).count(loop.clipper) == 1
    handle.remove()
    assert count_global_hooks() == count
    repeat(right, loop, 2)  # it replaces the hook of the deleted clipper
    assert count_global_hooks() == count
    assert list_owners(list_tables()[0]).count(loop.clipper) == 1
    for table in list_tables():
        assert sum(isinstance(hook, GlobalHook) for hook in table.values()) == 1


def test_a_clipper_may_be_deleted_during_the_step_of_an_optimizer():
    """As by the garbage collector; torch fails if a hook is removed then."""
    loops = [Loop() for _ in range(3)]
    for each in loops:
        right(each)
    handle = register_optimizer_step_pre_hook(lambda *_: loops.clear())
    loop = Loop()
    del each
    right(loop)
    right(loop)
    handle.remove()
    assert not loops


def test_clippers_of_other_parameters_share_a_scaler():
    """As in a GAN: each clips once, and steps of the other optimizer do not count."""
    loops = Loop(), Loop()
    loops[1].scaler = loops[0].scaler
    for _ in range(STEPS):
        for loop in loops:
            loop.optimizer.zero_grad()
            loop.backward(scale=64.0)
            loop.scaler.unscale_(loop.optimizer)
            loop.clipper.step()
            loop.scaler.step(loop.optimizer)
        loops[0].scaler.update()
    assert loops[0].clipper.metrics()["clip/steps"] == STEPS
