"""A clipper as an optimizer: its checkpoints and its copies."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from autoclip_torch import ClippedOptimizer, NormClip, TrustClip, optim

from ..support.torch_optimizers import (
    OPTIMIZERS,
    assert_same_clipper,
    assert_same_state,
    assert_same_weights,
    every_clipper,
    network,
    train,
    trained,
)

# Checkpoints.


@every_clipper
@pytest.mark.parametrize("name", ["SGD foreach", "Adam"])
def test_a_resumed_run_has_the_same_bits(wrap, name):
    model, optimizer = trained(wrap, name)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    resumed = network(seed=9)
    again = wrap(OPTIMIZERS[name](resumed.parameters()), resumed)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for run in ((model, optimizer), (resumed, again)):
        train(*run, steps=4)
    assert_same_weights(resumed, model)
    assert_same_state(again.state_dict(), optimizer.state_dict())


def as_docs_stacks_shows(model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "clipper": optimizer.clipper,
    }


@every_clipper
def test_a_distributed_checkpoint_holds_the_clipper_and_the_optimizer(wrap, tmp_path):
    """The optimizer's state has only the keys of torch's own optimizers."""
    model, resumed = network(), network(seed=9)
    optimizer = wrap(OPTIMIZERS["Adam"](model.parameters()), model)
    train(model, optimizer, steps=5)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is "
        )  # there is one process
        state = as_docs_stacks_shows(model, optimizer)
        assert "clipper" not in state["optimizer"]
        dcp.save(state, checkpoint_id=tmp_path)
        again = wrap(OPTIMIZERS["Adam"](resumed.parameters()), resumed)
        state = as_docs_stacks_shows(resumed, again)
        dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(resumed, state["model"])
    set_optimizer_state_dict(resumed, again, state["optimizer"])
    assert_same_state(again.clipper.state_dict(), optimizer.clipper.state_dict())
    for run in ((model, optimizer), (resumed, again)):
        train(*run, steps=4)
    assert_same_weights(resumed, model)
    assert_same_state(again.clipper.state_dict(), optimizer.clipper.state_dict())


@pytest.mark.parametrize("name", ["SGD foreach", "Adam"])
def test_a_distributed_checkpoint_adds_no_step(name):
    """torch creates the state of an optimizer by a step with zero gradients.

    SGD without momentum has no state, so torch does that in each call.
    """
    (model, optimizer), (resumed, again) = runs = [
        (net, OPTIMIZERS[name](net.parameters()))
        for net in (network(), network(seed=9))
    ]
    clipper, other = (TrustClip(*run) for run in runs)
    train(model, optimizer, steps=3)
    optimizer.zero_grad()
    state = get_optimizer_state_dict(model, optimizer)
    other.load_state_dict(clipper.state_dict())
    set_optimizer_state_dict(resumed, again, state)
    for each in (clipper, other):
        metrics = each.metrics()
        assert metrics["clip/steps"] == metrics["clip/update_steps"] == 3


def test_a_checkpoint_of_an_unclipped_optimizer_loads():
    """The clipper keeps its policy state."""
    model, optimizer = trained()
    plain = torch.optim.Adam(network().parameters(), lr=0.5)
    before = optimizer.clipper.state_dict()
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer.state) == 0
    assert_same_state(optimizer.clipper.state_dict(), before)
    train(model, optimizer, 2)


def test_a_checkpoint_loads_into_an_unclipped_optimizer():
    model, optimizer = trained()
    plain = torch.optim.Adam(model.parameters(), lr=0.5)
    plain.load_state_dict(optimizer.state_dict())
    assert_same_state(plain.state_dict(), optimizer.optimizer.state_dict())


def test_its_state_is_the_optimizer_s_and_the_clipper_s():
    _, optimizer = trained()
    state = optimizer.state_dict()
    assert list(state) == ["state", "param_groups", "clipper"]
    assert_same_state(state.pop("clipper"), optimizer.clipper.state_dict())
    assert_same_state(state, optimizer.optimizer.state_dict())


def of_another_quantile(state):
    state["clipper"]["policies"][0]["quantile"] = 0.25


def of_another_group(state):
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))


def of_fewer_parameters(state):
    state["param_groups"][0]["params"].pop()


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["host", "device"])
@pytest.mark.parametrize(
    "spoil", [of_another_quantile, of_another_group, of_fewer_parameters]
)
def test_a_failed_load_changes_nothing(spoil, device):
    """Either the optimizer or the clipper refuses; `metrics` is unchanged, too."""
    _, source = trained(steps=6)
    model, optimizer = trained(steps=3)
    other_model, other = trained(steps=3)
    for one in (optimizer, other):  # a history on a device is loaded in place
        one.clipper._policy_states.move_to(device)
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    with pytest.raises(
        ValueError, match=r"does not fit|doesn't match|different number"
    ):
        optimizer.load_state_dict(state)
    assert_same_state(optimizer.state_dict(), other.state_dict())
    assert optimizer.clipper.metrics() == other.clipper.metrics()
    train(model, optimizer, 3)
    train(other_model, other, 3)
    assert_same_weights(model, other_model)


def test_loading_does_not_change_the_given_state():
    _, optimizer = trained()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert "clipper" in state


# Copies.


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@every_clipper
def test_a_copy_with_its_model_trains_on_the_same(wrap, copied):
    model, optimizer = trained(wrap, "Adam")
    twin, same = copied((model, optimizer))
    assert type(same) is type(optimizer)
    ours = [p for group in same.param_groups for p in group["params"]]
    for p, q, original in zip(ours, twin.parameters(), model.parameters(), strict=True):
        assert p is q, "it still is the model's own parameter"
        assert p is not original
    assert_same_clipper(same.clipper, optimizer.clipper)
    train(model, optimizer, 4)
    train(twin, same, 4)
    assert_same_weights(twin, model)
    assert_same_state(same.state_dict(), optimizer.state_dict())


def test_a_copy_is_a_copy():
    """Training the original does not change the copy."""
    model, optimizer = trained()
    twin, same = copy.deepcopy((model, optimizer))
    weights = [p.detach().clone() for p in twin.parameters()]
    state = copy.deepcopy(same.state_dict())
    train(model, optimizer, 3)
    for p, before in zip(twin.parameters(), weights, strict=True):
        assert torch.equal(p, before)
    assert_same_state(same.state_dict(), state)


def test_a_pickle_may_name_the_class_in_optim():
    """Older pickles do: the class moved from `optim` to a private folder."""
    assert optim.ClippedOptimizer is ClippedOptimizer
    _, optimizer = trained()
    module = ClippedOptimizer.__module__.encode()
    pickled = pickle.dumps(optimizer, protocol=0)
    assert pickled.count(module) == 1
    same = pickle.loads(pickled.replace(module, b"autoclip_torch.optim"))
    assert type(same) is ClippedOptimizer
    assert_same_clipper(same.clipper, optimizer.clipper)


def test_a_copy_of_what_a_scheduler_drives():
    """A scheduler replaces `step` on the object it drives; the copy has its own."""
    model = network()
    optimizer = NormClip.as_optimizer(
        OPTIMIZERS["SGD"](model.parameters()), max_norm=0.1
    )
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    train(model, optimizer, 3, scheduler.step)
    twin, same = pickle.loads(pickle.dumps((model, optimizer)))
    weights = [p.detach().clone() for p in model.parameters()]
    train(twin, same, 2)
    assert not torch.equal(twin[0].weight, weights[0])
    for p, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, before)
