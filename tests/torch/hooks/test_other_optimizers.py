"""Optimizers of other kinds, each in reality: clipped, or refused by a rule."""

import copy
import importlib.util
import pickle
import types
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed.algorithms.model_averaging.averagers import (
    PeriodicModelAverager,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch uses torch.jit.script
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autoclip_core import ParamRatio
from autoclip_torch import NormClip, QuantileClip, TrustClip, UpdateClipper

LIMIT, STEPS = 1e-3, 3
SGD = torch.optim.SGD


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """ZeRO and local SGD need a group, here of one rank."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def po():
    return pytest.importorskip("pytorch_optimizer")


def load_lookahead():
    """Load timm's file alone: the package imports torchvision."""
    folder = importlib.util.find_spec("timm").submodule_search_locations[0]
    path = f"{folder}/optim/lookahead.py"
    spec = importlib.util.spec_from_file_location("timm_lookahead", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead


class Layer(torch.nn.Linear):
    """Its gradient has the norm 5 in each pass."""

    def __init__(self):
        super().__init__(2, 1, bias=False)

    def backward(self):
        for parameter in self.parameters():
            parameter.grad = None  # `zero_grad` of an optimizer may wrap its step
        self(torch.tensor([[3.0, 4.0]])).sum().backward()
        return torch.tensor(1.0)


class Norms(SGD):
    """Plain SGD that records the norm of the gradients with which it steps."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.norms = []

    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        (parameter,) = self.param_groups[0]["params"]
        self.norms.append(parameter.grad.norm().item())
        super().step()
        return loss


def sgd(layer):
    return Norms(layer.parameters(), lr=0.1)


IN_ONE_STEP = {
    "Muon": lambda o, layer: torch.optim.Muon(layer.parameters(), lr=0.1),
    "ZeroRedundancyOptimizer": lambda o, layer: ZeroRedundancyOptimizer(
        layer.parameters(), SGD, lr=0.1
    ),
    "PostLocalSGDOptimizer": lambda o, layer: PostLocalSGDOptimizer(
        sgd(layer), PeriodicModelAverager(period=2)
    ),
    "timm's Lookahead": lambda o, layer: load_lookahead()(sgd(layer)),
    "Lookahead": lambda o, layer: o.Lookahead(sgd(layer)),
    "ScheduleFreeSGD": lambda o, layer: o.ScheduleFreeSGD(layer.parameters()),
    "ScheduleFreeWrapper": lambda o, layer: o.ScheduleFreeWrapper(sgd(layer)),
    "GaLore": lambda o, layer: o.GaLore(layer.parameters()),
    "APOLLO": lambda o, layer: o.APOLLO(layer.parameters()),
    "OrthoGrad": lambda o, layer: o.OrthoGrad(sgd(layer)),
    "LBFGS": lambda o, layer: torch.optim.LBFGS(layer.parameters(), max_iter=1),
}
"""Optimizers that step in `step`."""


def clip(layer, optimizer, how):
    """Return the optimizer to step and its clipper."""
    if how == "attach":
        clipper = NormClip(layer, max_norm=LIMIT)
        clipper.attach(optimizer)
        return optimizer, clipper
    optimizer = NormClip.as_optimizer(optimizer, max_norm=LIMIT)
    return optimizer, optimizer.clipper


@pytest.mark.needs("peers")
@pytest.mark.parametrize("how", ["attach", "as_optimizer"])
@pytest.mark.parametrize("name", IN_ONE_STEP)
def test_every_step_is_clipped(po, name, how):
    layer = Layer()
    optimizer, clipper = clip(layer, IN_ONE_STEP[name](po, layer), how)
    if hasattr(optimizer, "train"):  # as trainers do for schedule-free optimizers
        optimizer.train()
    for step in range(1, STEPS + 1):
        layer.backward()
        optimizer.step(*[layer.backward] * (name == "LBFGS"))
        assert layer.weight.grad.norm().item() <= LIMIT * (1 + 1e-5)
        assert clipper.metrics()["clip/steps"] == step
        assert clipper.metrics()["clip/norm"] == pytest.approx(5.0)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    if hasattr(optimizer, "consolidate_state_dict"):  # ZeRO, before it saves
        optimizer.consolidate_state_dict()
    optimizer.load_state_dict(optimizer.state_dict())


def sam(o, layer):
    return o.SAM(layer.parameters(), Norms, lr=0.1)


IN_SEVERAL_STEPS = {
    "SAM": sam,
    "LookSAM": lambda o, layer: o.LookSAM(layer.parameters(), Norms, lr=0.1, k=1),
    "FriendlySAM": lambda o, layer: o.FriendlySAM(layer.parameters(), Norms, lr=0.1),
    "WSAM": lambda o, layer: o.WSAM(layer, layer.parameters(), Norms, lr=0.1),
}


@pytest.mark.needs("peers")
@pytest.mark.parametrize("name", IN_SEVERAL_STEPS)
def test_an_optimizer_of_two_steps_is_refused_with_the_lines_that_work(po, name):
    layer = Layer()
    optimizer, clipper = IN_SEVERAL_STEPS[name](po, layer), NormClip(layer, LIMIT)
    with pytest.raises(ValueError, match="also steps in first_step and second_") as e:
        clipper.attach(optimizer)
    lines = [line for line in str(e.value).split('"') if "clipper.step()" in line]
    assert len(lines) == 2
    names = {"clipper": clipper, "optimizer": optimizer}
    for line in lines:
        layer.backward()
        exec(line, names)
        assert layer.weight.grad.norm().item() <= LIMIT * (1 + 1e-5)
    assert clipper.metrics()["clip/steps"] == 2
    with pytest.raises(ValueError, match=r"SAM|first_step"):
        UpdateClipper(layer, optimizer, ParamRatio(0.02))


@pytest.mark.needs("peers")
@pytest.mark.parametrize("name", IN_SEVERAL_STEPS)
def test_as_optimizer_clips_in_each_of_the_two_steps(po, name):
    layer = Layer()
    optimizer = NormClip.as_optimizer(IN_SEVERAL_STEPS[name](po, layer), LIMIT)
    for method in (optimizer.first_step, optimizer.second_step):
        layer.backward()
        method()
    assert optimizer.clipper.metrics()["clip/steps"] == 2
    base = optimizer.base_optimizer
    assert base.norms == pytest.approx([LIMIT])


class Computes(SGD):
    """Its step computes the gradients, with or without a backward pass."""

    def __init__(self, layer, has_backward):
        super().__init__(layer.parameters(), lr=1.0)
        self.layer, self.has_backward = layer, has_backward

    def step(self, closure=None):
        if self.has_backward:
            with torch.enable_grad():
                self.layer.backward()
        else:
            self.layer.weight.grad = torch.full((1, 2), 5.0)
        super().step()


def gsam(o, layer, base=None):
    """Its `set_closure` receives the batch, and its step runs two backward passes."""
    base = base or SGD(layer.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(base, 100)
    rho = o.ProportionScheduler(schedule, 1.0, 0.5, 0.1, 0.05)
    optimizer = o.GSAM(layer.parameters(), base, model=layer, rho_scheduler=rho)
    batch = torch.tensor([[3.0, 4.0]]), torch.full((1, 1), 99.0)
    optimizer.set_closure(torch.nn.functional.mse_loss, *batch)
    return optimizer


COMPUTING = {
    "backward": lambda o, layer: Computes(layer, has_backward=True),
    "assignment": lambda o, layer: Computes(layer, has_backward=False),
    "GSAM": gsam,
}
"""Optimizers whose step computes the gradients after every hook."""


@pytest.mark.needs("peers")
@pytest.mark.parametrize("how", ["attach", "as_optimizer"])
@pytest.mark.parametrize("name", COMPUTING)
def test_a_step_that_computes_its_gradients_is_refused_at_once(po, name, how):
    layer = Layer()
    optimizer, _clipper = clip(layer, COMPUTING[name](po, layer), how)
    refused = pytest.raises(RuntimeError, match=r"step computes others.*base_optimi")
    with pytest.warns(UserWarning, match="not received a gradient yet"), refused:
        optimizer.step()


@pytest.mark.needs("peers")
def test_the_optimizer_that_gsam_calls_is_clipped(po):
    layer = Layer()
    optimizer = gsam(po, layer)
    NormClip(layer, LIMIT).attach(optimizer.base_optimizer)
    for _ in range(STEPS):
        before = layer.weight.detach().clone()
        optimizer.step()
        change = (layer.weight.detach() - before).norm().item()
        assert change == pytest.approx(LIMIT, rel=1e-2)


@pytest.mark.needs("peers")
def test_an_optimizer_that_steps_within_backward_is_refused(po):
    layer = Layer()
    with pytest.raises(ValueError, match="which steps within fused_backward"):
        NormClip(layer, LIMIT).attach(po.LOMO(layer))
    with pytest.raises(ValueError, match="which steps within fused_backward"):
        NormClip.as_optimizer(po.AdaLOMO(layer), LIMIT)


def test_zero_that_steps_within_the_communication_of_gradients_is_refused():
    layer = Layer()
    zero = ZeroRedundancyOptimizer(
        layer.parameters(), SGD, lr=0.1, overlap_with_ddp=True
    )
    with pytest.raises(ValueError, match="overlap_with_ddp=True"):
        NormClip(layer, LIMIT).attach(zero)
    with pytest.raises(ValueError, match="overlap_with_ddp=True"):
        NormClip.as_optimizer(zero, LIMIT)


class NoInit(torch.optim.Optimizer):
    """It has no hooks, and holds no other optimizer."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]

    def step(self, closure=None):
        raise NotImplementedError


def test_an_optimizer_without_hooks_is_refused_and_is_called_an_optimizer():
    layer = Layer()
    way_out = "got NoInit, whose __init__ does not call that of torch.optim.Optimizer"
    with pytest.raises(TypeError, match=way_out):
        NormClip(layer, LIMIT).attach(NoInit(layer.parameters()))
    with pytest.raises(TypeError, match=way_out):
        NormClip.as_optimizer(NoInit(layer.parameters()), LIMIT)
    with pytest.raises(TypeError, match=r"got list; .* clipper\.attach accepts a wra"):
        NormClip.as_optimizer([layer.weight], LIMIT)


@pytest.mark.needs("peers")
def test_a_step_that_a_scheduler_replaced_before_torch_wrapped_it_is_refused():
    """The hooks would never run. A scheduler that is made later is right."""
    layer, lookahead = Layer(), load_lookahead()
    late = lookahead(sgd(layer))
    torch.optim.lr_scheduler.StepLR(late, 1)
    clipper = NormClip(layer, LIMIT)
    with pytest.raises(RuntimeError, match="before a learning-rate scheduler is made"):
        clipper.attach(late)
    optimizer = lookahead(sgd(layer))
    clipper.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    layer.backward()
    optimizer.step()
    scheduler.step()
    assert clipper.metrics()["clip/steps"] == 1


class Fast(SGD):
    """Another method is its step, set on the object."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.step = self.step_fast

    def step_fast(self, closure=None):
        (weight,) = self.param_groups[0]["params"]
        weight.data.add_(weight.grad, alpha=-0.1)


@pytest.mark.parametrize("has_scheduler", [False, True])
@pytest.mark.parametrize("how", ["attach", "as_optimizer", "UpdateClipper"])
def test_a_step_set_on_the_object_that_runs_no_hooks_is_refused(how, has_scheduler):
    """In its first update. torch's scheduler replaces the step, too, and is right."""
    layer = Layer()
    optimizer = Fast(layer.parameters())
    if has_scheduler:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if how == "UpdateClipper":
        UpdateClipper(layer, optimizer, ParamRatio(0.02))
    else:
        optimizer, _clipper = clip(layer, optimizer, how)
    layer.backward()
    with pytest.raises(RuntimeError, match="got a Fast whose step was replaced by one"):
        optimizer.step()


def test_a_step_set_on_the_object_is_free_after_the_clipper_was_removed():
    layer = Layer()
    optimizer = Fast(layer.parameters())
    NormClip(layer, LIMIT).attach(optimizer).remove()
    layer.backward()
    optimizer.step()
    assert layer.weight.grad.norm() == 5.0


def in_some_calls(optimizer):
    """As a wrapper that accumulates gradients, here without torch's marks."""
    step, calls = optimizer.step, []

    def accumulate(*args):
        calls.append(True)
        return step(*args) if len(calls) % 2 == 0 else None

    optimizer.step = accumulate


def in_a_method(optimizer):
    step = optimizer.step
    optimizer.step = types.MethodType(lambda self: step(), optimizer)


REPLACED = {
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 9),
    "some calls": in_some_calls,
    "method": in_a_method,
    "the class's": lambda optimizer: setattr(optimizer, "step", optimizer.step),
}


@pytest.mark.parametrize("how", REPLACED)
def test_a_step_set_on_the_object_that_calls_that_of_the_class_is_clipped(how):
    layer = Layer()
    optimizer = sgd(layer)
    REPLACED[how](optimizer)
    for _ in range(2):  # a second clipper changes nothing
        clipper = NormClip(layer, LIMIT, dry_run=True)
        clipper.attach(optimizer)
    optimizer, clipper = clip(layer, optimizer, "attach")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 9)
    for _ in range(4):
        layer.backward()
        optimizer.step()
        scheduler.step()
    steps = 2 if how == "some calls" else 4
    assert clipper.metrics()["clip/steps"] == steps
    assert optimizer.norms == pytest.approx([LIMIT] * steps)


# Copies of a fused optimizer.

COPIES = {
    "copy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_copied_fused_optimizer_scales_in_its_kernel(kind, how):
    """So it cancels a step that is not finite, with its weight decay."""
    layer = Layer()
    make = getattr(torch.optim, kind)
    pair = layer, make(layer.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    layer, optimizer = COPIES[how](pair)
    clipper = NormClip(layer, LIMIT, scope="global")
    clipper.attach(optimizer)
    layer.backward()
    optimizer.step()
    assert clipper.metrics()["clip/clip_rate"] == 1
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(before, float("nan"))
    optimizer.step()
    assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_fused_optimizer_steps_under_a_scaler_as_the_first_one(how):
    layer = Layer()
    first = layer, torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    weights = []
    for layer, optimizer in (COPIES[how](first), first):
        clipper = QuantileClip(layer, quantile=0.5, scope="global")
        clipper.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for size in (1.0, 3.0, float("inf"), 2.0):
            layer.weight.grad = None
            loss = layer(torch.tensor([[3.0, 4.0]]) * size).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(layer.weight.detach())
        ring = clipper.state_dict()["states"][0]["ring"][0, :3]
        assert ring.tolist() == pytest.approx([5.0, 15.0, 10.0])
    torch.testing.assert_close(*weights)


# Hooks for the steps of every optimizer.


def run_hooks(optimizer, layer):
    """Return the hooks of a step, in order: torch's `test_step_all_hooks`."""
    ran = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: ran.append("global")),
        register_optimizer_step_post_hook(lambda o, *_: ran.append("end")),
        optimizer.register_step_pre_hook(lambda o, *_: ran.append("before")),
        optimizer.register_step_post_hook(lambda o, *_: ran.append("after")),
    ]
    layer.backward()
    optimizer.step()
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("kind", [QuantileClip, TrustClip])
def test_the_hooks_of_a_step_run_once_and_in_torchs_order(kind):
    layer = Layer()
    plain = run_hooks(SGD(layer.parameters()), layer)
    assert plain == ["global", "before", "after", "end"]
    clipped = kind.as_optimizer(SGD(layer.parameters()))
    assert run_hooks(clipped, layer) == plain
    twice = NormClip.as_optimizer(clipped, max_norm=1.0, dry_run=True)
    assert run_hooks(twice, layer) == plain
