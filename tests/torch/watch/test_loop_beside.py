"""A clipper by hand beside other threads, other clippers, and inside a step of torch:
such loops are right, and stay silent. A warning is an error in these tests.
"""

import subprocess
import sys
import threading

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autoclip_torch import AGC, NormClip, QuantileClip, TrustClip

SGD = torch.optim.SGD
STEPS = 30

THREADS = """
import threading, torch
from autoclip_torch import NormClip
torch.set_num_threads(1)

class Run:
    def __init__(self):
        self.model = torch.nn.Linear(8, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.clipper = NormClip(self.model, 1.0)
        self.train(1)

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.ones(16, 8)).square().mean().backward()
            self.clipper.step()
            self.optimizer.step()

runs = [Run() for _ in range(4)]
threads = [threading.Thread(target=run.train, args=(300,)) for run in runs]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def make(optimizer_class=SGD):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    return model, optimizer_class(model.parameters(), lr=1e-3)


def backward(model, optimizer):
    optimizer.zero_grad()
    (100 * model(torch.randn(16, 8)).square().mean()).backward()


def repeat(function, *args):
    for step in range(STEPS):
        function(step, *args)


def find_norm(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def run_in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.slow
def test_threads_that_train_models_of_their_own_do_not_crash():
    """One of them may not read gradients that a backward pass of another one writes."""
    subprocess.run([sys.executable, "-c", THREADS], check=True)


def test_steps_in_another_thread_are_not_those_of_this_clipper():
    clipped, _ = make()
    clipper = NormClip(clipped, 1.0)
    model, optimizer = make()

    def train(_, run):
        backward(clipped, optimizer)
        backward(model, optimizer)
        clipper.step()
        run(optimizer.step)

    repeat(train, run_in_thread)
    with pytest.warns(UserWarning, match="has no effect"):
        repeat(train, lambda function: function())


def test_a_clipper_may_move_to_another_thread():
    model, optimizer = make()
    clipper = NormClip(model, 1.0)

    def train():
        backward(model, optimizer)
        clipper.step()
        assert find_norm(model) <= 1.001
        optimizer.step()

    for _ in range(STEPS):
        run_in_thread(train)
    assert clipper.metrics()["clip/steps"] == STEPS


def test_a_wrong_order_in_a_thread_warns():
    def train():
        model, optimizer = make()
        clipper = NormClip(model, 1.0)
        for _ in range(STEPS):
            backward(model, optimizer)
            clipper.step()
            clipper.step()
            optimizer.step()

    with pytest.warns(UserWarning, match="several times before each"):
        run_in_thread(train)


@pytest.mark.parametrize(
    "register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook]
)
def test_clippers_may_start_and_end_during_the_step_of_an_optimizer(register):
    """As in another thread; torch fails if its table of hooks is changed then."""
    clippers = []

    def start_and_end(*_):
        model, optimizer = make()
        backward(model, optimizer)
        clippers.append(NormClip(model, 1.0))
        clippers[-1].step()
        model, optimizer = make()
        clippers.append(NormClip(model, 1.0))
        clippers[-1].attach(optimizer)
        if len(clippers) > 2:
            clippers[1].detach()

    start_and_end()
    model, optimizer = make()
    backward(model, optimizer)
    hooks = start_and_end, lambda *_: None
    handles = list(map(register, hooks))
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()


def test_a_clip_in_a_hook_of_the_optimizer_is_silent():
    model, optimizer = make()
    clipper = NormClip(model, 1.0)
    optimizer.register_step_pre_hook(lambda *_: clipper.step() and None)
    for _ in range(STEPS):
        backward(model, optimizer)
        optimizer.step()
        assert find_norm(model) <= 1.001


class ClippingSGD(SGD):
    """An optimizer whose step clips first."""

    clipper = None

    def step(self, closure=None):
        self.clipper.step()
        return super().step(closure)


def test_a_clip_in_the_step_of_a_subclass_is_silent():
    model, optimizer = make(ClippingSGD)
    optimizer.clipper = NormClip(model, 1.0)
    for _ in range(STEPS):
        backward(model, optimizer)
        optimizer.step()
        assert find_norm(model) <= 1.001


def test_a_clip_of_a_part_in_the_step_of_a_subclass_warns():
    model, optimizer = make(ClippingSGD)
    optimizer.clipper = NormClip([model.weight], 1.0)

    def train(_):
        backward(model, optimizer)
        optimizer.step()

    with pytest.warns(UserWarning, match="no clipper clips 1 of them"):
        repeat(train)


def test_a_clip_before_the_backward_pass_of_a_closure_warns():
    model, optimizer = make()
    clipper = NormClip(model, 1.0)
    backward(model, optimizer)

    def closure():
        clipper.step()
        backward(model, optimizer)

    with pytest.warns(UserWarning, match="has no effect: the closure"):
        repeat(lambda _: optimizer.step(closure))


@pytest.mark.parametrize("shared", ["all", "a part"])
def test_two_clippers_by_turns_are_silent(shared):
    trunk, optimizer = make()
    heads = [torch.nn.Linear(4, 2) for _ in range(2)]
    for head in heads:
        optimizer.add_param_group({"params": list(head.parameters())})
    if shared == "all":
        parts = 2 * [torch.nn.ModuleList([trunk, *heads])]
    else:
        parts = [torch.nn.Sequential(trunk, head) for head in heads]
    clippers = [NormClip(part, 1.0) for part in parts]
    for step in range(STEPS):
        backward(torch.nn.Sequential(trunk, heads[step % 2]), optimizer)
        clippers[step % 2].step()
        optimizer.step()


@pytest.mark.parametrize("beside", ["other parameters", "dry run"])
def test_a_left_out_clip_beside_a_clipper_that_does_not_clip_the_same_warns(beside):
    model, optimizer = make()
    other, _ = make()
    is_dry = beside == "dry run"
    clipper = NormClip(model, 1.0)
    second = NormClip(model if is_dry else other, 1.0, dry_run=is_dry)

    def train(step):
        backward(other, optimizer)
        backward(model, optimizer)
        second.step()
        if step % 2:
            clipper.step()
        optimizer.step()

    with pytest.warns(UserWarning, match="in some steps without"):
        repeat(train)


@pytest.mark.parametrize("is_attached", [True, False])
def test_the_second_of_two_clippers_may_measure_what_the_first_has_clipped(is_attached):
    model, optimizer = make()
    clippers = [NormClip(model, 1.0), QuantileClip(model, scope="global"), AGC(model)]
    if is_attached:
        for each in clippers:
            each.attach(optimizer)
    for _ in range(STEPS):
        backward(model, optimizer)
        if not is_attached:
            for each in clippers:
                each.step()
        optimizer.step()
        for each in clippers:
            each.metrics()


def test_the_halves_of_a_trust_clip_are_one_clipper():
    model, optimizer = make()
    clipper = TrustClip(model, optimizer)

    def train(_):
        backward(model, optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        clipper.metrics()

    with pytest.warns(UserWarning, match="clipped or normalized before it"):
        repeat(train)
