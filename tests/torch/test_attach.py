"""`clipper.attach(optimizer)` clips inside `optimizer.step()`, however it is called."""

import copy
import gc
import pickle
import warnings

import pytest
import torch

from autoclip_core import Drop, Fixed, Quantile
from autoclip_torch import Clipper, NormClip, QuantileClip
from autoclip_torch.hooks.clipper_chain import Attachment


def model_and_data(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    )
    return model, 5 * torch.randn(6, 3), 9 * torch.randn(6, 1)


def loss_of(model, x, y):
    return torch.nn.functional.mse_loss(model(x), y)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def train(optimizer, model, x, y, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    return weights(model)


def by_hand(make_optimizer, make_clipper, steps=5):
    model, x, y = model_and_data()
    optimizer, clipper = make_optimizer(model), make_clipper(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        clipper.step()
        optimizer.step()
    return weights(model), clipper.state_dict()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.1)


def clip(model):
    return QuantileClip(model, quantile=0.5, history_length=8, scope="global")


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Wrapper:
    """Steps the optimizer it holds, like many trainers' wrappers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def wrapped_twice(optimizer):
    return Wrapper(Wrapper(optimizer))


@pytest.mark.parametrize("wrap", [lambda o: o, Wrapper, wrapped_twice], ids="012")
def test_an_attached_clipper_steps_before_the_optimizer(wrap):
    model, x, y = model_and_data()
    optimizer, clipper = adam(model), clip(model)
    clipper.attach(wrap(optimizer))
    expected, state = by_hand(adam, clip)
    assert_same(train(optimizer, model, x, y), expected)
    assert_same(clipper.state_dict()["states"][0]["ring"], state["states"][0]["ring"])


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_with_a_closure_clipping_follows_the_backward(how):
    model, x, y = model_and_data()
    optimizer, clipper = adam(model), clip(model)
    clipper.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    for _ in range(5):
        if how == "positional":
            loss = optimizer.step(closure)
        else:
            loss = optimizer.step(closure=closure)
        assert loss.requires_grad
    assert_same(weights(model), by_hand(adam, clip)[0])


def test_lbfgs_is_clipped_after_every_backward():
    model, x, y = model_and_data()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    clipper = NormClip(model, max_norm=0.5)
    clipper.attach(optimizer)
    norms = []

    def closure():
        # LBFGS used the clipped gradient after the last call.
        if norms:
            left = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            assert left <= 0.5 * (1 + 1e-6)
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        norms.append(
            torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        )
        return loss

    optimizer.step(closure)
    assert len(norms) == 4
    assert min(norms) > 0.5
    assert clipper.metrics()["clip/steps"] == 4
    assert clipper.metrics()["clip/norm"] == pytest.approx(norms[-1], rel=1e-6)


def test_remove_restores_the_optimizer():
    model, x, y = model_and_data()
    optimizer = adam(model)
    handle = NormClip(model, max_norm=1e-3).attach(optimizer)
    assert isinstance(handle, Attachment)
    handle.remove()
    handle.remove()
    plain, _, _ = model_and_data()
    expected = train(adam(plain), plain, x, y)
    assert_same(train(optimizer, model, x, y), expected)
    assert not handle.active


def test_attaching_twice_is_an_error_unless_it_was_removed():
    model, _, _ = model_and_data()
    optimizer, clipper = adam(model), clip(model)
    handle = clipper.attach(optimizer)
    for other in (optimizer, adam(model)):
        with pytest.raises(RuntimeError, match="attached already"):
            clipper.attach(other)
    handle.remove()
    assert clipper.attach(optimizer).active


class CallsStepOfItsBase(torch.optim.Adam):
    """torch runs the hooks for the step of the class and for that of its base."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("has_closure", [False, True])
def test_a_step_of_a_subclass_clips_once(has_closure):
    """Otherwise the clipped norm would be recorded as a second norm."""
    adam(torch.nn.Linear(1, 1))  # torch hooks the class once
    runs = []
    for kind in (torch.optim.Adam, CallsStepOfItsBase):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = kind([weight], lr=0.1)
        clipper = QuantileClip([weight], quantile=0.5)
        clipper.attach(optimizer)
        for step in range(1, 6):
            weight.grad = torch.tensor([3.0, 4.0]) * (step % 3 + 1)
            optimizer.step(*[lambda: torch.ones(())] * has_closure)
        runs.append((clipper.metrics(), weight.tolist()))
    assert runs[0] == runs[1]
    assert runs[1][0]["clip/steps"] == 5


class Unsuspecting(torch.optim.SGD):
    """The step of a subclass of a subclass, too, runs the hooks of every class."""

    def step(self, closure=None):
        return super().step(closure)


class OfThreeClasses(Unsuspecting):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Unsuspecting, OfThreeClasses])
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_of_a_subclass_has_the_norms_of_a_hand_written_one(kind, fused):
    """Norms 1 to 6: the threshold is the median of the norms before."""
    for base in (torch.optim.SGD, Unsuspecting):  # torch hooks each class once
        base(torch.nn.Linear(1, 1).parameters())
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = kind([weight], lr=1.0, fused=fused)
    clipper = QuantileClip([weight], quantile=0.5, history_length=10)
    clipper.attach(optimizer)
    applied = []
    for norm in range(1, 7):
        before, weight.grad = weight.item(), torch.tensor([float(norm)])
        optimizer.step()
        applied.append(before - weight.item())
    assert applied == pytest.approx([1, 1, 1.5, 2, 2.5, 3])
    assert clipper.metrics()["clip/steps"] == 6
    assert clipper.threshold().item() == 3.5


def test_an_optimizer_that_clips_already_is_refused():
    model, _, _ = model_and_data()
    optimizer = NormClip.as_optimizer(adam(model), max_norm=1.0)
    with pytest.raises(RuntimeError, match="as_optimizer"):
        optimizer.clipper.attach(optimizer)


def test_two_clippers_may_share_an_optimizer_in_the_order_of_attaching():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    first, second = (Clipper([weight], Fixed(norm)) for norm in (2.0, 1.0))
    first.attach(optimizer)
    second.attach(optimizer)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert second.metrics()["clip/norm"] == pytest.approx(2.0)
    torch.testing.assert_close(weight.data, torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("clippers", ["part", "skips first", "skips last"])
@pytest.mark.parametrize("bad", [float("nan"), 100.0], ids=["nan", "dropped"])
def test_a_cancelled_update_cancels_all_that_the_optimizer_steps(bad, clippers, fused):
    """Before that, every clipper records its gradients."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([a, b], lr=0.1, fused=fused)
    policy, both = Drop(Fixed(50.0), action="skip"), [("a", a), ("b", b)]
    skips = Clipper(both, policy, nonfinite="skip", exclude=["b"])
    records = QuantileClip([b], quantile=0.5, history_length=8)
    order = {"part": [skips], "skips first": [skips, records]}
    for clipper in order.get(clippers, [records, skips]):
        clipper.attach(optimizer)
    for step, size in enumerate((1.0, bad, 2.0)):
        a.grad, b.grad = torch.full((2,), size), torch.full((2,), step + 1.0)
        before = copy.deepcopy((weights_of(a, b), optimizer.state_dict()["state"]))
        optimizer.step()
        after = weights_of(a, b), optimizer.state_dict()["state"]
        unchanged = all(map(torch.equal, before[0], after[0]))
        assert unchanged == (size is bad)
        steps = {float(state["step"]) for state in after[1].values()}
        assert steps == {float(step + (step == 0))}
    assert skips.metrics()["clip/skipped_total"] == 1
    if clippers != "part":
        count = records.state_dict()["states"][0]["count"]
        assert count.tolist() == [3]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_two_clippers_of_a_gradient_both_measure_a_cancelled_update(fused):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    Clipper([weight], Drop(Fixed(50.0), action="skip")).attach(optimizer)
    second = NormClip([weight], max_norm=1e6)
    second.attach(optimizer)
    for size in (3.0, 300.0):
        weight.grad = torch.tensor([size, 0.0])
        optimizer.step()
        assert second.metrics()["clip/norm"] == size
    assert torch.equal(weight.data, torch.tensor([0.7, 1.0]))


def weights_of(*parameters):
    return [p.detach().clone() for p in parameters]


def test_an_optimizer_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match="steps none of them"):
        clip(model_and_data()[0]).attach(adam(model_and_data()[0]))


@pytest.mark.parametrize("wrong", [3, None, "adam"])
def test_an_argument_that_is_not_an_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match="must be a torch"):
        clip(model_and_data()[0]).attach(wrong)


def test_it_warns_once_if_there_was_no_gradient():
    model, x, y = model_and_data()
    optimizer, clipper = adam(model), clip(model)
    clipper.attach(optimizer)
    with pytest.warns(UserWarning, match="has not received a gradient"):
        optimizer.step()
    train(optimizer, model, x, y, steps=1)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_parameters_that_are_added_to_the_optimizer_warn_once():
    model, x, y = model_and_data()
    first, last = model[0], model[2]
    optimizer = torch.optim.Adam(first.parameters(), lr=0.1)
    clipper = clip(first)
    clipper.attach(optimizer)
    train(optimizer, model, x, y, steps=1)
    optimizer.add_param_group({"params": last.parameters()})
    with pytest.warns(UserWarning, match=r"steps 4 tensors, and no clipper clips 2 of"):
        train(optimizer, model, x, y, steps=3)
    train(optimizer, model, x, y, steps=1)
    clipper.add_param_group({"params": last.parameters()})
    train(optimizer, model, x, y, steps=1)
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    assert norms.norm() <= clipper.metrics()["clip/threshold"] * (1 + 1e-5)


def test_a_parameter_appended_to_a_group_warns_once():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights[:2]], lr=0.1)
    NormClip(weights[:2], max_norm=1.0).attach(optimizer)
    optimizer.param_groups[0]["params"].append(weights[2])
    for p in weights:
        p.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"steps 3 tensors, and no clipper clips 1 of"):
        optimizer.step()
    optimizer.step()
    optimizer.param_groups.pop()
    optimizer.step()


def test_another_clipper_s_parameters_may_be_added_to_the_optimizer():
    model, x, y = model_and_data()
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.1)
    clip(model[0]).attach(optimizer)
    train(optimizer, model, x, y, steps=1)
    optimizer.add_param_group({"params": model[2].parameters()})
    clip(model[2]).attach(optimizer)
    train(optimizer, model, x, y, steps=2)


def test_the_clipper_s_parameters_may_be_added_to_the_optimizer():
    """This happens when layers are unfrozen one by one; one parameter is excluded."""
    model, x, y = model_and_data()
    for p in model[2].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.1)
    clipper = QuantileClip(model, scope="global", exclude="2.bias")
    clipper.attach(optimizer)
    train(optimizer, model, x, y, steps=1)
    for p in model[2].parameters():
        p.requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    train(optimizer, model, x, y, steps=2)


def pickled(things):
    return pickle.loads(pickle.dumps(things))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_not_attached_and_can_be_attached_to_each_other(copied):
    model, x, y = model_and_data()
    optimizer, clipper = adam(model), clip(model)
    clipper.attach(optimizer)
    train(optimizer, model, x, y, steps=2)
    other, step, twin = copied((model, optimizer, clipper))
    before = twin.metrics()["clip/steps"]
    with pytest.warns(UserWarning, match="the clipper does not act in its step"):
        train(step, copy.deepcopy(other), x, y, steps=1)  # a copy has no hooks
    assert twin.metrics()["clip/steps"] == before == 2
    twin.attach(step)
    assert_same(train(step, other, x, y, 3), train(optimizer, model, x, y, 3))
    assert twin.metrics() == clipper.metrics()


def test_a_clipper_whose_optimizer_was_deleted_can_be_attached_again():
    model, x, y = model_and_data()
    clipper = clip(model)
    handle = clipper.attach(adam(model))
    gc.collect()
    assert not handle.active
    optimizer = adam(model)
    clipper.attach(optimizer)
    train(optimizer, model, x, y, steps=1)
    assert clipper.metrics()["clip/steps"] == 1


def test_a_loaded_optimizer_stays_attached():
    model, x, y = model_and_data()
    optimizer, clipper = adam(model), clip(model)
    clipper.attach(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, x, y, steps=3)
    assert clipper.metrics()["clip/steps"] == 3


def test_a_skipped_update_leaves_a_plain_optimizer_alone():
    model, x, y = model_and_data()
    optimizer = adam(model)
    clipper = Clipper(model, Quantile(0.5), scope="global", nonfinite="skip")
    clipper.attach(optimizer)
    train(optimizer, model, x, y, steps=2)
    before = copy.deepcopy((weights(model), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    (loss_of(model, x, y) * float("nan")).backward()
    optimizer.step()
    assert_same(weights(model), before[0])
    for index, state in optimizer.state_dict()["state"].items():
        assert_same(state.values(), before[1][index].values())
    assert clipper.metrics()["clip/skipped_total"] == 1


def test_an_optimizer_of_some_of_the_parameters_is_refused():
    """Otherwise each optimizer of a GAN would clip and record both networks."""
    g, d = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    clipper = NormClip([g, d], max_norm=1.0, scope="parameter")
    optimizer = torch.optim.SGD([g], lr=0.1)
    with pytest.raises(
        ValueError, match="all parameters of its clipper, got 1 of the 2"
    ):
        clipper.attach(optimizer)
    d.requires_grad_(False)  # frozen parameters may be left out
    clipper.attach(optimizer)


def test_a_step_by_hand_of_an_attached_clipper_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    clipper = NormClip([weight], max_norm=1.0)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clipper.attach(optimizer)
    weight.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="clip the gradients twice"):
        clipper.step()
    clipper.detach()
    assert clipper.step().norm.item() == pytest.approx(2**0.5)


def warned_at(function):
    """Return the files and lines that the warnings of a call point at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    assert caught
    return {(warning.filename, warning.lineno) for warning in caught}


STEPS_OF = {
    "by hand": lambda p: NormClip(p, max_norm=1.0).step,
    "attached": lambda p: attached(p).step,
    "fused": lambda p: attached(p, fused=True).step,
    "a closure": lambda p: closed(attached(p)),
    "an optimizer": lambda p: NormClip.as_optimizer(sgd(p), max_norm=1.0).step,
}


def sgd(params, **keywords):
    return torch.optim.SGD(params, lr=1.0, **keywords)


def attached(params, **keywords):
    optimizer = sgd(params, **keywords)
    NormClip(params, max_norm=1.0).attach(optimizer)
    return optimizer


def closed(optimizer):
    return lambda: optimizer.step(lambda: 1.0)


@pytest.mark.parametrize("way", STEPS_OF)
def test_a_warning_points_at_the_line_that_stepped(way):
    """It does not point at torch or this package, whatever the number of hooks."""
    step = STEPS_OF[way]([torch.nn.Parameter(torch.zeros(2))])
    ((file, _),) = warned_at(step)
    assert file == __file__


def test_a_warning_of_many_steps_points_at_the_line_that_stepped():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = attached([weight])

    def steps():
        for _ in range(10):
            weight.grad = torch.full((2,), float("nan"))
            optimizer.step()

    ((file, _),) = warned_at(steps)
    assert file == __file__
