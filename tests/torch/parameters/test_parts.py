"""A clipper of some of the parameters that its optimizer steps says so.

Those of `WARN` leave parameters out; in those of `SILENT` each has a clipper, or is
left out on purpose.
"""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, SparseAdam

from autoclip_core import Fixed
from autoclip_torch import (
    AGC,
    Clipper,
    NormClip,
    QuantileClip,
    TrustClip,
    UpdateClipper,
    ValueClip,
    optim,
)
from autoclip_torch.optim import ClippedOptimizer

STEPS = 40
"""The first steps, and two further comparisons."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def sgd(*modules):
    parameters = [p for m in modules for p in m.parameters()]
    return SGD(parameters, lr=1e-6)


def clip(parameters, **keywords):
    return NormClip(parameters, max_norm=1.0, **keywords)


def attach(parameters, optimizer, **keywords):
    clipper = clip(parameters, **keywords)
    clipper.attach(optimizer)
    return clipper


def backward(model):
    (model(torch.ones(2, 4)) - 1e3).square().mean().backward()


def train(model, *steps, count=STEPS):
    """Take steps: a backward pass, then each of the functions."""
    for _ in range(count):
        model.zero_grad()
        backward(model)
        for step in steps:
            step()


# One warning.


def by_hand():
    """The extractor that actor and critic share is left out."""
    model = network()
    clipper, optimizer = clip(model[1].parameters()), sgd(model)
    train(model, clipper.step, optimizer.step)


def attached():
    model = network()
    attach(model[1], optimizer := sgd(model))
    train(model, optimizer.step)


def as_optimizer():
    model = network()
    train(model, ClippedOptimizer(sgd(model), clip(model[1])).step)


def with_a_closure():
    model = network()
    attach(model[1], optimizer := LBFGS(model.parameters(), lr=1e-9, max_iter=2))

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4)) - 1e3).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)


def a_loss_with_parameters():
    """As in pytorch-metric-learning: the optimizer steps those of the loss, too."""
    model = network()
    model.loss = nn.Linear(2, 2)
    model.forward = lambda x: model.loss(model[1](model[0](x)))
    clipper = clip([p for layer in model[:2] for p in layer.parameters()])
    train(model, clipper.step, SGD(model.named_parameters(), lr=1e-3).step)


def in_the_second_optimizer():
    """One clipper serves both, and does not have all of the second."""
    model = nn.Sequential(*network(), nn.Linear(2, 2))
    clipper = clip([*model[0].parameters(), *model[2].parameters()])
    first, second = sgd(model[0]), sgd(model[1], model[2])
    train(model, clipper.step, first.step, second.step)


def with_a_scaler():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    clipper, optimizer = clip(model[1].parameters()), sgd(model)

    def step():
        clipper.step(scaler=scaler, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()

    model.forward = lambda x: scaler.scale(model[1](model[0](x)))
    train(model, step)


def a_dry_run_that_ends():
    model = network()
    clipper = attach(model[1], optimizer := sgd(model), dry_run=True)
    train(model, optimizer.step)
    clipper.dry_run = False
    train(model, optimizer.step)


def the_other_clipper_is_deleted():
    model = network()
    clipper, other, optimizer = clip(model[0]), clip(model[1]), sgd(model)
    train(model, clipper.step, other.step, optimizer.step)
    del other
    train(model, clipper.step, optimizer.step)


def a_copy():
    model = network()
    objects = copy.deepcopy((model, clip(model[1].parameters()), sgd(model)))
    model, clipper, optimizer = objects
    train(model, clipper.step, optimizer.step)


def two_clippers_of_three_layers():
    model = nn.Sequential(*network(), nn.Linear(2, 2))
    attach(model[0], optimizer := sgd(model))
    clipper = clip(model[1], exclude=["bias"])
    train(model, clipper.step, optimizer.step)


def train_by_turns(is_first, count_of_others=0):
    """The part that is left out has a gradient in every second step."""
    model = network()
    others = [nn.Parameter(torch.zeros(1)) for _ in range(count_of_others)]
    clipper = clip([*model[1].parameters(), *others])
    optimizer, numbers = SGD([*model.parameters(), *others], lr=1e-6), itertools.count()

    def forward(x):
        has_gradient = next(numbers) % 2 != is_first
        return model[1](model[0](x) if has_gradient else x)

    model.forward = forward
    train(model, clipper.step, optimizer.step)


def in_every_second_step():
    """As the actor of TD3."""
    train_by_turns(is_first=True)


def in_the_other_second_steps():
    train_by_turns(is_first=False)


def in_every_second_step_beside_many_parameters():
    train_by_turns(is_first=True, count_of_others=70)


def beside_a_gradient_of_zero():
    model, task = network(), nn.Linear(4, 2)
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    clipper, optimizer = clip(model[1].parameters()), sgd(task, model)
    train(model, clipper.step, optimizer.step)


PART = r"SGD steps 4 tensors, .* clips 2 of them, such as one of shape \(4, 4\);"
NAMED = "steps 6 tensors, and no clipper clips 2 of them, such as loss.weight;"

WARN = {
    by_hand: PART,
    attached: PART,
    as_optimizer: PART,
    with_a_closure: "LBFGS steps 4 tensors",
    a_loss_with_parameters: NAMED,
    in_the_second_optimizer: r"steps 4 tensors, .* clips 2 of them, .* \(2, 4\);",
    with_a_scaler: PART,
    a_dry_run_that_ends: PART,
    the_other_clipper_is_deleted: "no clipper clips 2 of them",
    a_copy: PART,
    in_every_second_step: PART,
    in_the_other_second_steps: PART,
    in_every_second_step_beside_many_parameters: "no clipper clips 2 of them",
    beside_a_gradient_of_zero: r"steps 6 tensors, .* clips 2 of them, .* \(4, 4\);",
}


@pytest.mark.parametrize("scenario", WARN, ids=lambda each: each.__name__)
def test_a_clipper_of_a_part_warns_once(scenario):
    with pytest.warns(UserWarning, match=WARN[scenario]) as caught:
        scenario()
    assert len(caught) == 1


def test_every_clipper_of_a_part_warns():
    """Each names what the other one has not, either."""
    with pytest.warns(
        UserWarning, match="steps 6 tensors, and no clipper clips 2"
    ) as w:
        two_clippers_of_three_layers()
    assert len(w) == 2


@pytest.mark.parametrize("is_attached", [False, True])
@pytest.mark.parametrize("later", ["unfrozen", "added"])
def test_what_is_trained_later_is_named_two_steps_after_a_comparison(
    later, is_attached
):
    """Parameters are compared every 17 steps, and in each step once some are found."""
    model = network()
    model[0].requires_grad_(False)
    clipper = clip(model[1].parameters())
    optimizer = sgd(model) if later == "unfrozen" else sgd(model[1])
    if is_attached:
        clipper.attach(optimizer)
    steps = [] if is_attached else [clipper.step]
    train(model, *steps, optimizer.step, count=20)
    model[0].requires_grad_(True)
    if later == "added":
        optimizer.add_param_group({"params": model[0].parameters()})
    with pytest.warns(UserWarning, match=PART):
        train(model, *steps, optimizer.step, count=19)


WAYS_OUT = {
    "the model": lambda model, clipper: clip(model),
    "a group": lambda model, clipper: clipper.add_param_group(
        {"params": model[0].parameters()}
    ),
    "exclude": lambda model, clipper: clip(model, exclude=["0.*"]),
    "named": lambda model, clipper: clip(model.named_parameters(), exclude=["0.*"]),
}


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_each_way_out_ends_the_warning(way_out):
    model = network()
    clipper, optimizer = clip(model[1]), sgd(model)
    clipper = WAYS_OUT[way_out](model, clipper) or clipper
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, clipper.step, optimizer.step)


# No warning.


def both_by_hand():
    model = network()
    clippers, optimizer = [clip(layer.parameters()) for layer in model], sgd(model)
    train(model, *(each.step for each in clippers), optimizer.step)


def both_attached():
    model = network()
    optimizer = sgd(model)
    for layer in model:
        attach(layer.parameters(), optimizer)
    train(model, optimizer.step)


def both_wrapped():
    model = network()
    inside = ClippedOptimizer(sgd(model), clip(model[0]))
    train(model, ClippedOptimizer(inside, clip(model[1])).step)


def one_by_hand_and_one_attached():
    model = network()
    clipper, optimizer = clip(model[0].parameters()), sgd(model)
    attach(model[1].parameters(), optimizer)
    train(model, clipper.step, optimizer.step)


def one_by_hand_and_one_wrapped():
    model = network()
    clipper = clip(model[0].parameters())
    optimizer = ClippedOptimizer(sgd(model), clip(model[1]))
    train(model, clipper.step, optimizer.step)


def one_attached_and_one_wrapped():
    model = network()
    inside = sgd(model)
    attach(model[1].parameters(), inside)
    train(model, ClippedOptimizer(inside, clip(model[0])).step)


def a_part_beside_all():
    """The second clipper of a parameter replaces no other one."""
    model = network()
    inside = sgd(model)
    attach(model, inside, norm="max")
    clipper = clip(model[1])
    optimizer = optim.AGC(inside, 0.1, model=model)
    attach(model[0], inside)
    train(model, clipper.step, optimizer.step)


def a_part_beside_clippers_of_one_step():
    """The other part has a new clipper in each step."""
    model = network()
    first, second = (clip(layer.parameters()) for layer in model)
    second.attach(optimizer := sgd(model))
    other = lambda: ValueClip(model[1], 1.0).step()  # noqa: E731
    train(model, first.step, other, sgd(model).step)
    del first
    train(model, lambda: ValueClip(model[0], 1.0).step(), optimizer.step)


def a_part_beside_value_clipping():
    model = network()
    clippers = clip(model[0]), ValueClip(model.parameters(), 1.0)
    train(model, *(each.step for each in clippers), sgd(model).step)


def a_part_beside_update_clipping():
    model = network()
    clipper, optimizer = clip(model[0].parameters()), sgd(model)
    UpdateClipper(model, optimizer, Fixed(1.0))
    train(model, clipper.step, optimizer.step)


def an_attached_part_beside_update_clipping():
    model = network()
    optimizer = sgd(model)
    attach(model[0], optimizer)
    UpdateClipper(model, optimizer, Fixed(1.0), exclude=["1.bias"])
    train(model, optimizer.step)


def a_part_beside_trust():
    model = network()
    optimizer = TrustClip.as_optimizer(sgd(model))
    measure = clip(model[0], dry_run=True)
    train(model, measure.step, optimizer.step)


def later(count):
    """The second part is trained later, with a clipper that is made then."""
    model = network()
    model[0].requires_grad_(False)
    clipper, optimizer = clip(model[1].parameters()), sgd(model)
    train(model, clipper.step, optimizer.step, count=count)
    model[0].requires_grad_(True)
    other = clip(model[0].parameters())
    train(model, clipper.step, other.step, optimizer.step)


def at_any_time():
    for count in range(1, 24):
        later(count)


def a_group_that_another_clipper_gets():
    model = network()
    clipper, optimizer = clip(model[1].parameters()), sgd(model[1])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = lambda: clipper.step(scaler=scaler, optimizer=optimizer)  # noqa: E731
    train(model, step, optimizer.step, count=5)
    optimizer.add_param_group({"params": model[0].parameters()})
    other = clip(model[0].parameters())
    train(model, step, other.step, optimizer.step)


def excluded():
    model = network()
    clippers, optimizer = [clip(model, exclude=["0"]), clip(model[0])], sgd(model)
    clippers[1].attach(optimizer)
    train(model, clippers[0].step, optimizer.step)


def excluded_by_another_clipper():
    model = network()
    clippers, optimizer = [clip(model, exclude=["0"]), clip(model[1])], sgd(model)
    train(model, *(each.step for each in clippers), optimizer.step)


def removed():
    model = network()
    clipper, optimizer = clip(model.parameters()), sgd(model)
    train(model, clipper.step, optimizer.step, count=2)
    clipper.remove_params(model[0])
    other = attach(model[1].parameters(), optimizer)
    train(model, clipper.step, optimizer.step)
    assert other


def frozen():
    """As in LoRA: the optimizer has all, and only some are trained."""
    model = network()
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    train(model, clip(trained).step, sgd(model).step)


def frozen_by_the_learning_rate():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[1].parameters(), "lr": torch.tensor(1e-6)},
    ]
    train(model, clip(model[1].parameters()).step, SGD(groups).step)


def frozen_by_a_learning_rate_in_a_tensor():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": torch.tensor(0.0)},
        {"params": model[1].parameters(), "lr": torch.tensor(1e-6)},
    ]
    train(model, clip(model[1].parameters()).step, SGD(groups).step)


def heads_of_earlier_tasks():
    """`zero_grad(set_to_none=False)` leaves them gradients of 0."""
    body, heads = nn.Linear(4, 4), [nn.Linear(4, 2) for _ in range(3)]
    optimizer = sgd(body, *heads)
    for head in heads:
        model = nn.Sequential(body, head)
        model.zero_grad = lambda: optimizer.zero_grad(set_to_none=False)
        clipper = clip(model.parameters())
        train(model, clipper.step, optimizer.step)


def frozen_by_turns():
    model = network()
    optimizer, clippers = sgd(model), [clip(layer.parameters()) for layer in model]
    for index in (0, 1, 0, 1):
        optimizer.zero_grad()
        model[1 - index].requires_grad_(False)
        train(model, clippers[index].step, optimizer.step, count=7)
        model[1 - index].requires_grad_(True)


def without_a_gradient():
    model = network()
    model.forward = lambda x: model[1](x)
    train(model, clip(model[1].parameters()).step, sgd(model).step)


def another_model():
    """As in a GAN: the judge gets gradients from the step of the generator."""
    generator, judge = network(), nn.Linear(2, 2)
    both, first, second = nn.Sequential(generator, judge), sgd(generator), sgd(judge)
    clipper = clip(generator.parameters())
    for _ in range(STEPS):
        train(both, clipper.step, first.step, count=1)
        train(both, second.step, count=2)


def an_encoder_in_a_step_without_a_clip():
    """As in CURL: only the critic's gradients are clipped, on purpose."""
    encoder, critic, head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    clipper = clip(nn.Sequential(encoder, critic))
    first, second = sgd(encoder, critic), sgd(encoder, head)
    for _ in range(STEPS):
        train(nn.Sequential(encoder, critic), clipper.step, first.step, count=1)
        train(nn.Sequential(encoder, head), second.step, count=1)


def sparse_embeddings():
    """`clip_grad_norm_` of torch does not clip them."""
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    clipper, optimizer = clip(model[1].parameters()), sgd(model)
    other, sparse = sgd(model[1]), SparseAdam(model[0].parameters())

    def backward():
        model.zero_grad()
        model(torch.tensor([1, 2])).sum().backward()

    for _ in range(STEPS):
        for steps in ([optimizer.step], [other.step, sparse.step]):
            backward()
            clipper.step()
            for step in steps:
                step()


def groups():
    """A clipper with an own rule for each group of one optimizer."""
    model = network()
    parts = [{"params": list(layer.parameters())} for layer in model]
    clippers = AGC(parts[:1]), QuantileClip(parts[1:], 0.9)
    train(model, *(each.step for each in clippers), SGD(parts, lr=1e-6).step)


def a_clipper_for_each_parameter():
    model = network()
    clippers = [Clipper([parameter], Fixed(1.0)) for parameter in model.parameters()]
    train(model, *(each.step for each in clippers), sgd(model).step)


def an_optimizer_for_each_parameter():
    model = network()
    optimizers = [SGD([parameter], lr=1e-3) for parameter in model.parameters()]
    for parameter, optimizer in zip(model.parameters(), optimizers, strict=True):
        attach([parameter], optimizer)
    train(model, *(each.step for each in optimizers))


def an_optimizer_for_each_kind():
    """As Muon for matrices and AdamW for vectors, with one clipper or with two."""
    model, other = network(), network()
    for each, is_one in ((model, True), (other, False)):
        matrices = [p for p in each.parameters() if p.ndim == 2]
        vectors = [p for p in each.parameters() if p.ndim == 1]
        kinds = [each] if is_one else [matrices, vectors]
        clippers = [clip(kind) for kind in kinds]
        optimizers = SGD(matrices, lr=1e-3), AdamW(vectors)
        train(each, *(c.step for c in clippers), *(o.step for o in optimizers))


def a_dry_run():
    model = network()
    measures = clip(model[0], dry_run=True), clip(model[1], dry_run=True)
    measures[1].attach(optimizer := sgd(model))
    train(model, measures[0].step, optimizer.step)


def a_part_beside_a_dry_run():
    model = network()
    clippers = clip(model.parameters(), dry_run=True), clip(model[0].parameters())
    train(model, *(each.step for each in clippers), sgd(model).step)


def rarely():
    """The second part has a gradient, and a clip, in every fifth step."""
    model, numbers = network(), itertools.count()
    clippers, optimizer = [clip(layer.parameters()) for layer in model], sgd(model)

    def step():
        clippers[1].step()
        if next(numbers) % 5:
            model[0].zero_grad()
        else:
            clippers[0].step()
        optimizer.step()

    train(model, step)


def copied_and_attached_again():
    model = network()
    optimizer = sgd(model)
    clippers = [attach(layer, optimizer) for layer in model]
    train(model, optimizer.step, count=2)
    model, optimizer, clippers = copy.deepcopy((model, optimizer, clippers))
    for clipper in clippers:
        clipper.attach(optimizer)
    train(model, optimizer.step)


SILENT = [
    both_by_hand,
    both_attached,
    both_wrapped,
    one_by_hand_and_one_attached,
    one_by_hand_and_one_wrapped,
    one_attached_and_one_wrapped,
    a_part_beside_all,
    a_part_beside_clippers_of_one_step,
    a_part_beside_value_clipping,
    a_part_beside_update_clipping,
    an_attached_part_beside_update_clipping,
    a_part_beside_trust,
    at_any_time,
    a_group_that_another_clipper_gets,
    excluded,
    excluded_by_another_clipper,
    removed,
    frozen,
    frozen_by_the_learning_rate,
    frozen_by_a_learning_rate_in_a_tensor,
    heads_of_earlier_tasks,
    frozen_by_turns,
    without_a_gradient,
    another_model,
    an_encoder_in_a_step_without_a_clip,
    sparse_embeddings,
    groups,
    a_clipper_for_each_parameter,
    an_optimizer_for_each_parameter,
    an_optimizer_for_each_kind,
    a_dry_run,
    a_part_beside_a_dry_run,
    rarely,
    copied_and_attached_again,
]


@pytest.mark.parametrize("scenario", SILENT, ids=lambda each: each.__name__)
def test_a_part_on_purpose_is_silent(scenario):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scenario()
