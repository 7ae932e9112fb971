"""Which optimizers an `UpdateClipper` accepts and refuses."""

import copy
import inspect

import pytest
import torch
from torch import nn

from autoclip_core import Drop, Fixed, ParamRatio
from autoclip_torch import Clipper, UpdateClipper

RATIO = 0.05

# torch's optimizers. SparseAdam is in `test_update_clipper.py`.

ACCEPTED = {
    "SGD": {"lr": 1.0, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.3},
    "AdamW": {"lr": 0.3, "amsgrad": True},
    "Adagrad": {"lr": 1.0},
    "Adadelta": {"lr": 300.0},
    "Adafactor": {"lr": 1.0},
    "Adamax": {"lr": 0.3},
    "Muon": {"lr": 1.0},
    "NAdam": {"lr": 0.3},
    "RAdam": {"lr": 3.0},
    "RMSprop": {"lr": 0.1, "momentum": 0.9},
    "Rprop": {"lr": 1.0},
}
REFUSED = {"LBFGS", "ASGD"}
WAYS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
WAYS["foreach, maximize"] = {"foreach": True, "maximize": True}
SEPARATE = {"SparseAdam", "Optimizer"}


def test_every_optimizer_of_torch_is_in_a_table():
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    names = {k for k, v in classes if issubclass(v, torch.optim.Optimizer)}
    assert names == {*ACCEPTED, *REFUSED, *SEPARATE}


def ways_of(name):
    """The implementations of an optimizer, among its keywords."""
    parameters = inspect.signature(getattr(torch.optim, name)).parameters
    return [w for w, keywords in WAYS.items() if keywords.keys() <= parameters.keys()]


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in ACCEPTED for way in ways_of(name)]
)
def test_an_optimizer_is_clipped_to_the_bound(name, way):
    """A copy of the optimizer without a clipper takes each step, too."""
    model = nn.Linear(3, 4, bias=False)
    make = getattr(torch.optim, name)
    optimizer = make(model.parameters(), **ACCEPTED[name], **WAYS[way])
    clipper = UpdateClipper(model, optimizer, ParamRatio(RATIO))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model.weight.grad = torch.randn(4, 3, generator=generator)
        twin, free = copy.deepcopy((model, optimizer))
        twin.weight.grad = model.weight.grad.clone()
        before = model.weight.detach().clone()
        free.step()
        optimizer.step()
        change = twin.weight.detach() - before
        scale = min(1.0, RATIO * float(before.norm() / change.norm()))
        expected = before + scale * change
        torch.testing.assert_close(
            model.weight.detach(), expected, rtol=1e-5, atol=1e-6
        )
    assert clipper.metrics()["clip/update_clip_rate"] > 0


# What is refused, and why.


def schedule_free(name):
    return lambda p: getattr(optimizers(), name)(p)


def optimizers():
    return pytest.importorskip("pytorch_optimizer")


def wrapped(name):
    return lambda p: getattr(optimizers(), name)(torch.optim.SGD(p, lr=0.1))


class WithMasterWeights(torch.optim.SGD):
    """As the optimizers of NVIDIA apex, which keep the copies under this name."""

    master_weights = True


REASONS = {
    "LBFGS": (torch.optim.LBFGS, "several steps"),
    "ASGD": (torch.optim.ASGD, "averages"),
    "ScheduleFreeAdamW": (schedule_free("ScheduleFreeAdamW"), "interpolates"),
    "ScheduleFreeSGD": (schedule_free("ScheduleFreeSGD"), "interpolates"),
    "Ranger": (schedule_free("Ranger"), "slow weights"),
    "FTRL": (schedule_free("FTRL"), "sums"),
    "Lookahead": (wrapped("Lookahead"), "slow weights"),
    "SAM": (lambda p: optimizers().SAM(p, torch.optim.SGD, lr=0.1), "twice"),
    "master weights": (lambda p: WithMasterWeights(p, lr=0.1), "float32 copies"),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_optimizer_with_weights_of_its_own_is_refused(name):
    make, reason = REASONS[name]
    model = nn.Linear(3, 4)
    optimizer = make(list(model.parameters()))
    with pytest.raises(ValueError, match=rf"{reason}.*clip its gradients instead"):
        UpdateClipper(model, optimizer, ParamRatio(RATIO))


class SlowWeights(torch.optim.SGD):
    """An optimizer of a user: every second step pulls the weights to slow ones."""

    @torch.no_grad()
    def step(self, closure=None):
        states = [(p, self.state[p]) for p in self.param_groups[0]["params"]]
        for p, state in states:
            state.setdefault("slow", p.detach().clone())
            state["step"] = state.get("step", 0) + 1
        super().step(closure)
        for p, state in states:
            if state["step"] % 2 == 0:
                p.copy_(state["slow"].lerp_(p, 0.5))


def test_an_unknown_optimizer_with_weights_in_its_state_is_warned_of_once():
    model = nn.Linear(3, 4)
    optimizer = SlowWeights(model.parameters(), lr=0.1)
    UpdateClipper(model, optimizer, ParamRatio(RATIO))
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if step == 1:
            with pytest.warns(UserWarning, match="'slow' in the optimizer's state"):
                optimizer.step()
        else:
            optimizer.step()


WITHOUT_WEIGHTS = {
    "initial weights": lambda p: optimizers().Prodigy(p),
    "the gradients": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_a_state_that_equals_the_weights_only_at_first_is_not_warned_of(name):
    """pytest makes a warning an error."""
    model = nn.Linear(3, 4)
    optimizer = WITHOUT_WEIGHTS[name](list(model.parameters()))
    UpdateClipper(model, optimizer, ParamRatio(RATIO))
    for _ in range(3):
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
    tensors = [v for v in optimizer.state[model.weight].values() if v is not None]
    assert any(v.shape == model.weight.shape for v in tensors if torch.is_tensor(v))


def misuses():
    """Yield the arguments of each misuse, the error and a part of its text."""
    model = nn.Linear(3, 4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    ratio = ParamRatio(RATIO)
    other = torch.optim.SGD(nn.Linear(3, 4).parameters(), lr=0.1)
    skip = Drop(Fixed(1.0), action="skip")
    within = Drop(Fixed(9.0), clip=skip)
    return {
        "no model": (
            (list(model.parameters()), sgd, ratio),
            {},
            TypeError,
            "model must",
        ),
        "no optimizer": ((model, model, ratio), {}, TypeError, "optimizer must"),
        "another model": ((model, other, ratio), {}, ValueError, "steps none of them"),
        "no policy": ((model, sgd, 0.02), {}, TypeError, "policy"),
        "skip": ((model, sgd, ratio), {"nonfinite": "skip"}, ValueError, "skip in a"),
        "drop": ((model, sgd, skip), {}, ValueError, "skip in a Clipper"),
        "drop inside": ((model, sgd, within), {}, ValueError, "skip in a Clipper"),
        "warm-up": ((model, sgd, within), {"warmup_steps": 3}, ValueError, "skip in a"),
        "scope": ((model, sgd, ratio), {"scope": "layer"}, ValueError, "scope must be"),
        "norm": ((model, sgd, ratio), {"norm": "l1"}, ValueError, "norm must be"),
        "name": ((model, sgd, ratio), {"exclude": "head"}, ValueError, "exclude"),
        "dry run": ((model, sgd, ratio), {"dry_run": 1}, TypeError, "dry_run"),
        "loss": ((model, sgd, ratio), {"loss_policy": ratio}, TypeError, "loss_policy"),
    }


@pytest.mark.parametrize("name", misuses())
def test_a_misuse_is_refused_and_leaves_no_hook(name):
    (model, optimizer, policy), keywords, error, text = misuses()[name]
    with pytest.raises(error, match=text):
        UpdateClipper(model, optimizer, policy, **keywords)
    assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)


def test_the_way_out_of_a_skip_works():
    """A clipper of the gradients may skip in front of an update clipper."""
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Clipper(model, Drop(Fixed(1.0), action="skip")).attach(optimizer)
    UpdateClipper(model, optimizer, ParamRatio(RATIO))
    before = model.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, 9.0)
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_within_the_backward_pass_each_optimizer_has_a_clipper():
    """With one optimizer per parameter, each steps as soon as its gradient exists."""
    model = nn.Linear(3, 4)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=100.0)
        UpdateClipper(model, optimizer, ParamRatio(RATIO))
        p.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    model(torch.ones(2, 3)).sum().backward()
    for name, p in model.named_parameters():
        change = torch.linalg.vector_norm(p.detach() - before[name])
        assert float(change) == pytest.approx(
            RATIO * float(before[name].norm()), rel=1e-5
        )


# torch itself uses it to compile an optimizer.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_a_compiled_step_is_clipped():
    """torch breaks the graph around the hooks of an optimizer."""
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    clipper = UpdateClipper(model, optimizer, ParamRatio(RATIO))
    step = torch.compile(optimizer.step, backend="eager")
    for count in (1, 2):
        before = model.weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        step()
        change = torch.linalg.vector_norm(model.weight.detach() - before)
        assert float(change) == pytest.approx(RATIO * float(before.norm()), rel=1e-5)
        assert clipper.metrics()["clip/update_steps"] == count
