"""A clipper follows its optimizer or its model: every way of use, every change.

Each step compares the thresholds with plain lists of norms, one list per parameter. A
parameter that replaces another one continues its list.
"""

import copy
import gc
import math
import warnings

import pytest
import torch
from torch import nn

from autoclip_core import Fixed
from autoclip_core.clipper.trust import QUANTILE
from autoclip_torch import Clipper, TrustClip, UpdateClipper

from ...support.account import POLICIES

POLICY, threshold_of = POLICIES["quantile"]
LR = 0.1
SCALER = torch.amp.GradScaler("cpu", enabled=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)


def sgd(model, **keywords):
    groups = [{"params": [p]} for p in model.parameters()]
    return torch.optim.SGD(groups, lr=LR, **keywords)


class Run:
    """A model that is trained and clipped in one way; each parameter is one row."""

    def __init__(self, way):
        self.model, self.way = Net(), way
        self.optimizer = sgd(self.model, fused=way == "fused")
        self.trained = {
            f"{layer}.{kind}": getattr(getattr(self.model, layer), kind)
            for layer in ("body", "head")
            for kind in ("weight", "bias")
        }
        self.past, self.steps = {}, 0
        self.clipper = WAYS[way](self)

    def attach(self, parameters):
        clipper = Clipper(parameters, POLICY)
        clipper.attach(self.optimizer)
        return clipper

    def wrap(self, model):
        self.optimizer = Clipper.as_optimizer(self.optimizer, POLICY, model=model)
        return self.optimizer.clipper

    def take(self, steps):
        for _ in range(steps):
            self.steps += 1
            for place, p in enumerate(self.trained.values()):
                rng = torch.Generator().manual_seed(100 * self.steps + place)
                p.grad = torch.randn(p.shape, generator=rng) * 3 ** (self.steps % 4)
            raw = {key: p.grad.clone() for key, p in self.trained.items()}
            if self.way == "by hand, scaler":
                self.clipper.step(scaler=SCALER, optimizer=self.optimizer)
            elif self.way.startswith("by hand"):
                self.clipper.step()
            self.optimizer.step()
            self.check(raw)

    def check(self, raw):
        """Compare the rows with the lists of norms, and the gradients with both."""
        clipped = dict(zip(self.clipper.names, self.clipper.parameters, strict=True))
        assert set(map(id, clipped.values())) == set(map(id, self.trained.values()))
        rows = {id(p): name for name, p in clipped.items()}
        metrics = self.clipper.metrics(per_row=True)
        for key, parameter in self.trained.items():
            past, norm = self.past.setdefault(key, []), raw[key].norm().item()
            limit = threshold_of(past)
            seen = metrics[f"clip/threshold/{rows[id(parameter)]}"]
            assert seen == pytest.approx(limit, rel=2e-6), key
            scale = min(1, limit / norm)
            torch.testing.assert_close(parameter.grad, raw[key] * scale)
            past.append(norm)


WAYS = {
    "by hand, model": lambda run: Clipper(run.model, POLICY),
    "by hand, groups": lambda run: Clipper(
        [{"params": run.model.body}, {"params": run.model.head}], POLICY
    ),
    "by hand, scaler": lambda run: Clipper(list(run.trained.values()), POLICY),
    "by hand, optimizer": lambda run: Clipper(run.optimizer, POLICY),
    "attached, model": lambda run: run.attach(run.model),
    "attached, optimizer": lambda run: run.attach(run.optimizer),
    "attached, list": lambda run: run.attach(list(run.model.parameters())),
    "attached, names": lambda run: run.attach(run.model.named_parameters()),
    "fused": lambda run: run.attach(run.model),
    "as optimizer": lambda run: run.wrap(None),
    "as optimizer, model": lambda run: run.wrap(run.model),
}


def substitute(run, key, parameter):
    """Put a parameter in place of another one, in the model and in the optimizer."""
    layer, kind = key.split(".")
    old, run.trained[key] = run.trained[key], parameter
    setattr(getattr(run.model, layer), kind, parameter)
    for group in run.optimizer.param_groups:
        group["params"] = [parameter if p is old else p for p in group["params"]]
    old.grad = torch.full_like(old, 1e6)  # a stale gradient, which must not count


def replaced(run):
    substitute(run, "body.weight", nn.Parameter(torch.ones(3, 4)))


def assigned(run):
    """`load_state_dict(assign=True)` replaces every parameter."""
    state = {key: torch.ones_like(value) for key, value in run.trained.items()}
    run.model.load_state_dict(state, assign=True)
    for key in run.trained:
        layer, kind = key.split(".")
        substitute(run, key, getattr(getattr(run.model, layer), kind))


def grown(run):
    """Densification: the parameters have more rows."""
    for key in ("body.weight", "body.bias"):
        old = run.trained[key]
        more = torch.cat([old.detach(), torch.ones_like(old)])
        substitute(run, key, nn.Parameter(more))


def new_head(run):
    run.model.head = nn.Linear(3, 7)
    for kind in ("weight", "bias"):
        substitute(run, f"head.{kind}", getattr(run.model.head, kind))


def gone(run):
    run.model.head.bias = None
    run.trained.pop("head.bias").grad = torch.full((2,), 1e6)
    del run.optimizer.param_groups[-1]


def added(run):
    run.model.body.extra = nn.Parameter(torch.ones(5))
    run.trained["body.extra"] = run.model.body.extra
    run.optimizer.add_param_group({"params": [run.model.body.extra]})


def appended(run):
    run.model.head.extra = nn.Parameter(torch.ones(5))
    run.trained["head.extra"] = run.model.head.extra
    run.optimizer.param_groups[0]["params"].append(run.model.head.extra)


def adapted(run):
    """The head is inside an adapter: its parameters have other names."""
    run.model.head = nn.Sequential(run.model.head, nn.Linear(2, 2))
    run.trained["adapter"] = run.model.head[1].weight
    run.model.head[1].bias = None
    run.optimizer.add_param_group({"params": run.model.head[1].parameters()})


CHANGES = [replaced, assigned, grown, new_head, gone, added, appended, adapted]
LISTS = ("attached, list", "attached, names", "by hand, scaler")


def is_followed(way, change):
    if way == "by hand, groups":  # a layer that is replaced was not given by name
        return change not in (new_head, adapted)
    return not (way in LISTS and change in (added, appended, adapted))


CASES = [(w, c) for w in WAYS for c in CHANGES if is_followed(w, c)]


@pytest.mark.parametrize(("way", "change"), CASES)
def test_a_change_is_followed_in_the_next_step(way, change):
    run = Run(way)
    run.take(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(run)
        run.take(3)
    assert math.isfinite(run.clipper.metrics()["clip/norm"])


@pytest.mark.parametrize("way", ["by hand, model", "as optimizer", "fused"])
def test_a_run_that_is_resumed_after_changes_is_identical(way):
    """A clipper that is made after the changes has the same rows in the same order."""
    whole = Run(way)
    whole.take(3)
    for change in (grown, appended, gone):
        change(whole)
        whole.take(2)
    resumed = copy.deepcopy(whole)
    resumed.optimizer = torch.optim.SGD(resumed.optimizer.param_groups, lr=LR)
    resumed.clipper = WAYS[way](resumed)
    resumed.clipper.load_state_dict(whole.clipper.state_dict())
    for run in (whole, resumed):
        run.take(4)
    seen, expected = (run.clipper.metrics(per_row=True) for run in (resumed, whole))
    assert seen == expected
    for key, parameter in whole.trained.items():
        assert torch.equal(resumed.trained[key].grad, parameter.grad)


@pytest.mark.parametrize(
    "way", ["by hand, model", "as optimizer", "as optimizer, model"]
)
def test_a_copy_follows_its_own_model(way):
    run = Run(way)
    run.take(3)
    twin = copy.deepcopy(run)
    for each in (twin, run):
        assigned(each)
        each.take(2)


def test_a_model_of_many_modules_is_compared_in_every_second_step():
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(200))  # 801 members
    clipper = Clipper(model, Fixed(1.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clipper.step()
    model[0].weight = nn.Parameter(torch.ones(1, 1))
    for _ in range(2):
        clipper.step()
    assert clipper.parameters[0] is model[0].weight


def test_parameters_that_no_clipper_has_warn_and_are_named():
    run = Run("attached, names")
    run.take(1)
    extra = nn.Parameter(torch.zeros(2, 2))
    run.optimizer.add_param_group({"params": [extra]})
    run.take(20)  # it has no gradient
    extra.grad = torch.ones(2, 2)
    with pytest.warns(UserWarning, match=r"clips 1 of them, such as .* \(2, 2\)"):
        run.take(20)
    run.take(20)


def test_an_optimizer_of_other_parameters_warns():
    run = Run("attached, list")
    run.take(2)
    run.optimizer.param_groups = [{**run.optimizer.param_groups[0], "params": []}]
    with pytest.warns(UserWarning, match="none of the clipper's parameters, such as"):
        run.optimizer.step()


def test_a_wrapped_optimizer_may_be_swapped():
    run = Run("as optimizer")
    run.take(3)
    assigned(run)
    run.optimizer.optimizer = sgd(run.model)
    run.take(3)


# Without a module: Gaussian splatting keeps its tensors in an optimizer.


def densify(optimizer, keep, more):
    """Prune and extend each parameter as graphdeco's gaussian-splatting does."""
    for group in optimizer.param_groups:
        old = group["params"][0]
        state = optimizer.state.pop(old)
        new = torch.cat([old.detach()[keep], torch.ones(more, *old.shape[1:])])
        for name in ("exp_avg", "exp_avg_sq"):
            zeros = torch.zeros(more, *old.shape[1:])
            state[name] = torch.cat([state[name][keep], zeros])
        group["params"][0] = nn.Parameter(new)
        optimizer.state[group["params"][0]] = state


def wrapped(optimizer):
    optimizer = Clipper.as_optimizer(optimizer, POLICY)
    return optimizer, optimizer.clipper


def attached(optimizer, parameters):
    clipper = Clipper(parameters, POLICY)
    clipper.attach(optimizer)
    return optimizer, clipper


MAKERS = {
    "as optimizer": wrapped,
    "optimizer": lambda o: attached(o, o),
    "list": lambda o: attached(o, [g["params"][0] for g in o.param_groups]),
    "trust": lambda o: (o, TrustClip(None, o)),
    "update": lambda o: (o, UpdateClipper(None, o, Fixed(0.5))),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_densification_keeps_the_history_and_no_old_tensor(kind):
    points = [nn.Parameter(torch.ones(61, width)) for width in (3, 1)]
    adam = torch.optim.Adam([{"params": [p], "name": "x"} for p in points], lr=0.1)
    optimizer, clipper = MAKERS[kind](adam)
    past, sizes = [[], []], {61}
    del points
    for step in range(12):
        for place, group in enumerate(adam.param_groups):
            (p,) = group["params"]
            p.grad = torch.full_like(p, 2.0 ** ((step * 7 + place) % 5))
            past[place].append(p.grad.norm().item())
        optimizer.step()
        if step % 3 == 1:
            densify(adam, keep=slice(1, None), more=2 + step)
            sizes.add(len(adam.param_groups[0]["params"][0]))
    sizes.remove(len(p))
    assert list_tensors(sizes) == []
    assert len(clipper.names) == 2
    if kind == "trust":
        norms = torch.tensor(past).square().sum(0).sqrt()
        seen = clipper.metrics()["clip/threshold"]
        assert seen == pytest.approx(torch.quantile(norms[:-1], QUANTILE).item())
    elif kind != "update":
        wanted = [threshold_of(norms) for norms in past]
        torch.testing.assert_close(clipper.threshold(), torch.tensor(wanted))


def list_tensors(sizes):
    """Return the shapes of the tensors that exist and have a length among the sizes."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)
    tensors = [each for each in gc.get_objects() if type(each) in kinds]
    return [tuple(t.shape) for t in tensors if t.ndim == 2 and len(t) in sizes]
