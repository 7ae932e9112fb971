"""A clipper measures what its optimizer steps; otherwise one warning says so.

Each scenario is a loop as people write it. Those of `WARN` break the rule, those of
`SILENT` are legitimate uses.
"""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from autoclip_core import Fixed
from autoclip_torch import Clipper, NormClip, QuantileClip, TrustClip, UpdateClipper

STEPS = 32  # parameters are compared in every 17th step


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def sgd(*modules):
    return SGD([p for m in modules for p in m.parameters()], lr=1e-3)


def backward(model):
    (model(torch.ones(2, 4)) - 1e3).square().mean().backward()


def train(model, *steps, count=STEPS, zero=None):
    """Take steps: a backward pass, then each of the functions."""
    for _ in range(count):
        (zero or model).zero_grad()
        backward(model)
        for step in steps:
            step()


def clipper_of(parameters, **keywords):
    return NormClip(parameters, max_norm=1.0, **keywords)


def attached(parameters, optimizer, **keywords):
    clipper = clipper_of(parameters, **keywords)
    clipper.attach(optimizer)
    return clipper


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


# One warning.


def wrapper_replaced():
    model = network()
    optimizer = NormClip.as_optimizer(sgd(model), max_norm=1.0)
    train(model, optimizer.step, count=2)
    optimizer = sgd(model)
    train(model, optimizer.step)


def wrapper_unclipped():
    model = network()
    optimizer = NormClip.as_optimizer(sgd(model), max_norm=1.0, model=model)
    train(model, optimizer.step, count=2)
    train(model, AdamW(model.parameters()).step)


def inside_stepped():
    model = network()
    inside = sgd(model)
    optimizer = QuantileClip.as_optimizer(inside, 0.5)
    train(model, optimizer.step, count=2)
    train(model, inside.step)


def attached_and_dropped():
    """Clipper and optimizer are gone, and the model is trained further."""
    model = network()
    attached(model, optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    optimizer = sgd(model)
    train(model, optimizer.step)


def parameters_moved(*, kind=attached):
    """The other optimizer has stepped before, with other parameters."""
    body, head = network()
    first, second = sgd(body), sgd(head)
    clipper = kind(body, first)
    for layer, optimizer in ((body, first), (head, second)):
        train(layer, optimizer.step, count=2)
    second.add_param_group({"params": list(body.parameters())})
    del first
    train(body, second.step, count=4)
    assert clipper


def parameters_moved_with_update():
    parameters_moved(kind=lambda m, o: UpdateClipper(m, o, Fixed(1.0)))


def optimizer_rebuilt():
    model = network()
    optimizer = sgd(model)
    clipper = Clipper(optimizer, Fixed(1.0))
    for _ in range(2):
        train(model, clipper.step, optimizer.step, count=12)
        model = network()
        optimizer = sgd(model)


def list_assigned():
    model = network()
    clipper, optimizer = clipper_of(model.parameters()), sgd(model)
    train(model, clipper.step, optimizer.step, count=2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    train(model, clipper.step, sgd(model).step)


def model_copied():
    model = network()
    clipper, optimizer = clipper_of(model), sgd(model)
    train(model, clipper.step, optimizer.step, count=2)
    model.zero_grad()
    twin = copy.deepcopy(model)
    train(twin, clipper.step, sgd(twin).step)


def masters_clipped_too_late(make=lambda p: p.detach().clone().requires_grad_()):
    """The gradients of a model in half precision are copied, then the model clips."""
    model = network().bfloat16()
    masters = [make(parameter) for parameter in model.parameters()]
    clipper, optimizer = clipper_of(model), SGD(masters, lr=1e-3)

    def copy_gradients():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.to(master.dtype, copy=True)

    model.forward = lambda x: model[1](model[0](x.bfloat16()))
    train(model, copy_gradients, clipper.step, optimizer.step)


def float_masters_clipped_too_late():
    masters_clipped_too_late(lambda p: p.detach().float())


def masters_of_two_optimizers_clipped_too_late():
    model = network()
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    clipper = clipper_of(model)
    optimizers = SGD(masters[:1], lr=1e-6), SGD(masters[1:], lr=1e-6)
    pairs = list(zip(masters, model.parameters(), strict=True))

    def copy_gradients():
        for master, parameter in pairs:
            master.grad = parameter.grad.clone()

    def copy_back():
        for master, parameter in pairs:
            parameter.data.copy_(master.detach())

    train(model, copy_gradients, clipper.step, *(o.step for o in optimizers), copy_back)


def flat_copy_clipped_too_late():
    model = network()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    clipper, optimizer = clipper_of(model), SGD([flat], lr=1e-6)

    def copy_gradients():
        flat.grad = torch.cat([p.grad.flatten() for p in model.parameters()])

    def copy_back():
        with torch.no_grad():
            nn.utils.vector_to_parameters(flat, model.parameters())

    train(model, copy_gradients, clipper.step, optimizer.step, copy_back)


def masters_unscaled_after_the_clip():
    """The gradients of the float32 copies are divided by the loss scale."""
    model = network()
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    clipper, optimizer = clipper_of(model), SGD(masters, lr=1e-3)

    def copy_gradients():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad / 128

    def copy_back():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(master.detach())

    train(model, clipper.step, copy_gradients, optimizer.step, copy_back)


class Adapted(nn.Module):
    """A frozen layer, and a small one that is added to it, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.small = nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.small(x)


def adapters_added(kind=attached):
    """The optimizer of the adapters steps none of the clipper's parameters."""
    model = network()
    clipper = kind(model, optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    for index in range(2):
        model[index] = Adapted(model[index])
    optimizer = SGD(trained(model), lr=1e-3)
    train(model, optimizer.step)
    assert clipper


def replaced_in_an_attached_list():
    """A new optimizer steps the body, which the clipper has, and another head."""
    model = network()
    clipper = attached(model.parameters(), optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    model[1] = nn.Linear(4, 2)
    optimizer = sgd(model)
    train(model, optimizer.step)
    assert clipper


def only_the_head_in_a_new_optimizer():
    """The body is frozen by leaving it out."""
    model = network()
    optimizer = NormClip.as_optimizer(sgd(model), max_norm=1.0)
    train(model, optimizer.step, count=2)
    optimizer = sgd(model[1])
    train(model, optimizer.step)


def adapters_added_with_trust():
    adapters_added(TrustClip)


def parameters_of_the_model_replaced():
    model = network()
    clipper = attached(model, optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.bias = nn.Parameter(layer.bias.detach().clone())
    optimizer = sgd(model)
    train(model, optimizer.step)
    assert clipper


def all_copied(*, copied=copy.deepcopy, kind=attached):
    """As population-based training does, and an agent that is saved whole."""
    model = network()
    clipper = kind(model, optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    model, optimizer, clipper = copied((model, optimizer, clipper))
    train(model, optimizer.step)


def all_unpickled():
    all_copied(copied=lambda objects: pickle.loads(pickle.dumps(objects)))


def all_copied_with_trust():
    all_copied(kind=TrustClip)


def unfrozen_in_a_new_optimizer():
    model = network()
    model[0].requires_grad_(False)
    clipper, optimizer = clipper_of(trained(model)), SGD(trained(model), lr=1e-3)
    train(model, clipper.step, optimizer.step, count=4)
    model[0].requires_grad_(True)
    train(model, clipper.step, sgd(model).step)


def unfrozen_attached():
    model = network()
    model[0].requires_grad_(False)
    attached(trained(model), optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    model[0].requires_grad_(True)
    train(model, optimizer.step)


def replaced_in_a_list():
    """The new optimizer steps the head that replaces another one."""
    model = network()
    clipper, optimizer = clipper_of(model.parameters()), sgd(model)
    train(model, clipper.step, optimizer.step, count=4)
    model[1] = nn.Linear(4, 2)
    optimizer = sgd(model)
    train(model, clipper.step, optimizer.step)


def replaced_in_a_list_and_a_group():
    model = network()
    clipper, optimizer = clipper_of(model.parameters()), sgd(model)
    train(model, clipper.step, optimizer.step, count=4)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model[0].weight
    train(model, clipper.step, optimizer.step)


def unfrozen_by_hand():
    model = network()
    model[0].requires_grad_(False)
    clipper, optimizer = clipper_of(trained(model)), sgd(model)
    train(model, clipper.step, optimizer.step, count=2)
    model[0].requires_grad_(True)
    train(model, clipper.step, optimizer.step)


def group_added():
    """The clipper by hand does not know the optimizer."""
    model = network()
    clipper, optimizer = clipper_of(model[1].parameters()), sgd(model[1])
    train(model, clipper.step, optimizer.step, count=2)
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, clipper.step, optimizer.step)


def not_stepped():
    """The body is frozen by leaving it out of the optimizer, and has gradients."""
    model = network()
    clipper, optimizer = clipper_of(model), sgd(model[1])
    train(model, clipper.step, optimizer.step, count=2 * STEPS)


def not_stepped_attached():
    model = network()
    model[0].requires_grad_(False)
    attached(model, optimizer := sgd(model[1]))
    train(model, optimizer.step, count=2)
    model[0].requires_grad_(True)
    train(model, optimizer.step, count=2 * STEPS)


ATTACHED = "of a clipper, such as .*, but the clipper does not act in its step"
WRAPPED = "such as .*, that the optimizer of as_optimizer"
NO_EFFECT = r"clipper.step\(\) has no effect: SGD steps other parameters of the same"
UNCLIPPED = (
    r"steps 4 tensors, and no clipper clips 2 of them, such as one of shape \(4, 4\)"
)
UNSTEPPED = r"measures 2 parameters, such as one of shape \(4,\), that no optimizer"

WARN = {
    wrapper_replaced: f"SGD stepped.*{WRAPPED}",
    wrapper_unclipped: f"AdamW stepped.*{WRAPPED}",
    inside_stepped: f"SGD stepped.*{WRAPPED}",
    attached_and_dropped: ATTACHED,
    adapters_added: ATTACHED,
    adapters_added_with_trust: ATTACHED,
    replaced_in_an_attached_list: ATTACHED,
    only_the_head_in_a_new_optimizer: f"SGD stepped.*{WRAPPED}",
    parameters_of_the_model_replaced: ATTACHED,
    all_copied: ATTACHED,
    all_unpickled: ATTACHED,
    all_copied_with_trust: ATTACHED,
    unfrozen_in_a_new_optimizer: UNCLIPPED,
    parameters_moved: ATTACHED,
    parameters_moved_with_update: ATTACHED,
    optimizer_rebuilt: NO_EFFECT,
    list_assigned: NO_EFFECT,
    masters_clipped_too_late: NO_EFFECT,
    float_masters_clipped_too_late: NO_EFFECT,
    masters_of_two_optimizers_clipped_too_late: NO_EFFECT,
    flat_copy_clipped_too_late: NO_EFFECT,
    masters_unscaled_after_the_clip: "gradients were multiplied by 0.00781 between",
    model_copied: NO_EFFECT,
    unfrozen_attached: UNCLIPPED,
    unfrozen_by_hand: UNCLIPPED,
    replaced_in_a_list: r"no clipper clips 2 of them, such as one of shape \(2, 4\)",
    replaced_in_a_list_and_a_group: "no clipper clips 1 of them",
    group_added: UNCLIPPED,
    not_stepped: UNSTEPPED,
    not_stepped_attached: UNSTEPPED,
}


@pytest.mark.parametrize("scenario", WARN, ids=lambda each: each.__name__)
def test_what_is_not_clipped_warns_once(scenario):
    with pytest.warns(UserWarning, match=WARN[scenario]) as caught:
        scenario()
    assert len(caught) == 1


# No warning.


def a_clipper_for_each_part():
    model = network()
    optimizer = sgd(model)
    attached(model[0], optimizer)
    attached(model[1].parameters(), optimizer)
    train(model, optimizer.step)


def gradients_that_are_missing_at_times():
    """No optimizer steps, so nothing tells that some parameters are not stepped."""
    model = network()
    clipper = clipper_of(model)
    missing = {20: model[0].weight, 37: model[0].bias}  # two comparisons
    for step in range(1, 2 * STEPS):
        model.zero_grad()
        backward(model)
        if step in missing:
            missing[step].grad = None
        clipper.step()


def an_excluded_part():
    model = network()
    clipper = clipper_of(model, exclude=["0.*"])
    optimizer, other = sgd(model[1]), sgd(model[0])
    clipper.attach(optimizer)
    train(model, optimizer.step, other.step)
    train(model, other.step)


def a_removed_part():
    model = network()
    clipper, optimizer = attached(model, first := sgd(model)), first
    train(model, optimizer.step, count=2)
    clipper.remove_params(model[0])
    train(model, optimizer.step)


def a_replaced_parameter():
    """The optimizer steps the old one, too."""
    model = network()
    clipper, optimizer = clipper_of(model.parameters()), sgd(model)
    train(model, clipper.step, optimizer.step, count=2)
    new = nn.Parameter(torch.zeros(2))
    clipper.replace_param(model[1].bias, new)
    optimizer.add_param_group({"params": [new]})
    train(model, clipper.step, optimizer.step)


def several_optimizers():
    """One clipper, and optimizers that step by turns and in other intervals."""
    model, numbers = network(), itertools.count()
    clipper = clipper_of(model)
    body, head = sgd(model[0]), sgd(model[1])
    step_body = lambda: next(numbers) % 20 or body.step()  # noqa: E731
    train(model, clipper.step, step_body, head.step, count=3 * STEPS)


def adversaries():
    """The gradients of the generator pass through the discriminator."""
    generator, judge = network(), nn.Linear(2, 2)
    both, first, second = nn.Sequential(generator, judge), sgd(generator), sgd(judge)
    attached(generator, first)
    clipper = clipper_of(judge)
    train(both, first.step)
    train(both, first.step, clipper.step, second.step)


def an_encoder_in_two_optimizers():
    """Only one of the optimizers that share the encoder is clipped."""
    encoder, actor, critic = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    first, second = sgd(encoder, critic), sgd(encoder, actor)
    attached(nn.Sequential(encoder, critic), first)
    for _ in range(3):
        train(nn.Sequential(encoder, critic), first.step, count=4)
        train(nn.Sequential(encoder, actor), second.step, count=4)


def changed_by_hand():
    """Measured, in no optimizer, and still trained."""
    model = network()
    clipper, optimizer = clipper_of(model), sgd(model[1])

    def update():
        for parameter in model[0].parameters():
            parameter.data -= 1e-3 * parameter.grad

    train(model, clipper.step, optimizer.step, update)


def an_encoder_in_two_optimizers_by_hand():
    """The actor is not clipped on purpose."""
    encoder, actor, critic = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    first, second = sgd(encoder, critic), sgd(encoder, actor)
    clipper = clipper_of(nn.Sequential(encoder, critic))
    for _ in range(5):
        train(nn.Sequential(encoder, critic), clipper.step, first.step, count=4)
        train(nn.Sequential(encoder, actor), second.step, count=4)


def without_gradient():
    model = network()
    model.extra = nn.Linear(2, 2)
    optimizer = sgd(model[0], model[1], model.extra)
    clipper = clipper_of([p for layer in model[:2] for p in layer.parameters()])
    model.forward = lambda x: model[1](model[0](x))
    train(model, clipper.step, optimizer.step)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    clipper, optimizer = clipper_of(model.named_parameters()), sgd(model[0])
    optimizer.add_param_group({"params": model[1].bias})
    model.forward = lambda x: model[1](model[0](x))[:, :2]
    train(model, clipper.step, optimizer.step)


def frozen_and_unfrozen():
    model = network()
    model[0].requires_grad_(False)
    attached(model, optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    model[0].requires_grad_(True)
    train(model, optimizer.step)


def clipped_at_first():
    """A phase without clipping, after one with it."""
    model = network()
    clipper, optimizer = clipper_of(model.parameters()), sgd(model)
    train(model, clipper.step, optimizer.step, count=10)
    train(model, optimizer.step)


def detached():
    model = network()
    optimizer = NormClip.as_optimizer(sgd(model), max_norm=1.0)
    train(model, optimizer.step, count=2)
    optimizer.clipper.detach()
    train(model, sgd(model).step)


def detached_parts():
    model = network()
    optimizer = sgd(model)
    attached(model[0], optimizer)
    second = attached(model[1], optimizer)
    train(model, optimizer.step, count=2)
    second.detach()
    train(model, optimizer.step)


def swapped_with_its_clipper():
    """By hand after attached, as a trainer that makes both again."""
    model = network()
    first = attached(model, optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    clipper, optimizer = clipper_of(model), sgd(model)
    train(model, clipper.step, optimizer.step)
    assert first


def one_of_two_models():
    """Two models of the same shapes, by turns; only one of them is clipped."""
    model, other = network(), network()
    clipper, optimizer, free = clipper_of(model), sgd(model), sgd(other)
    for _ in range(4):
        train(model, clipper.step, optimizer.step, count=3)
        train(other, free.step, count=3)


def masters_that_receive_clipped_gradients():
    """As in the wrappers of Megatron-LM and Apex: no version number changes."""
    model = network()
    masters = [p.detach().clone() for p in model.parameters()]
    clipper, optimizer = clipper_of(model), SGD(masters, lr=1e-3)
    for master in masters:
        master.grad = torch.zeros_like(master)

    def step_masters():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad.data.copy_(parameter.grad)
        optimizer.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(master)

    train(model, clipper.step, step_masters)


def masters_that_share_gradients(view=lambda gradient: gradient):
    """As in A3C: the local model clips what the optimizer of the global one uses."""
    model, shared = network(), network()
    clipper, optimizer = clipper_of(model), sgd(shared)

    def share():
        for parameter, master in zip(
            model.parameters(), shared.parameters(), strict=True
        ):
            master.grad = view(parameter.grad)

    step = lambda: model.load_state_dict(shared.state_dict())  # noqa: E731
    train(model, share, clipper.step, optimizer.step, step)
    assert shared[0].weight.grad.norm() < 1.0


def masters_with_views_of_gradients():
    masters_that_share_gradients(lambda gradient: gradient[:])


def twins_of_which_one_is_stepped_by_hand():
    """Both compute their gradients before the clip, and both are clipped."""
    first, second = network(), network()
    clippers, optimizer = (clipper_of(first), clipper_of(second)), sgd(second)

    def update():
        for parameter in first.parameters():
            parameter.data -= 1e-3 * parameter.grad

    steps = (lambda: backward(second), *(c.step for c in clippers))
    train(first, *steps, update, optimizer.step, optimizer.zero_grad)


def a_layer_that_is_updated_more_often():
    model, numbers = (
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))),
        itertools.count(),
    )
    clipper, rare, often = clipper_of(model), sgd(model[0], model[2]), sgd(model[1])
    train(model, clipper.step, lambda: next(numbers) % 12 or rare.step(), often.step)


def a_twin_that_is_not_clipped():
    first, second = network(), network()
    clipper, optimizer = clipper_of(first), sgd(second)

    def update():
        with torch.no_grad():
            for parameter in first.parameters():
                parameter -= 1e-6 * parameter.grad

    backward(second)
    train(first, clipper.step, optimizer.step, update)


def a_twin_that_is_updated_less_often():
    first, second = network(), network()
    clipper, optimizers = clipper_of(first), (sgd(first), sgd(second))
    numbers = itertools.count()
    rarely = lambda: next(numbers) % 8 or optimizers[0].step()  # noqa: E731
    backward(second)
    train(first, clipper.step, rarely, optimizers[1].step)


def wrappers_by_turns():
    model = network()
    inside = sgd(model)
    first = NormClip.as_optimizer(inside, max_norm=1.0)
    second = QuantileClip.as_optimizer(inside, 0.5)
    train(model, first.step, lambda: (backward(model), second.step()))


class Above(SGD):
    """torch runs the hooks in its step, and in the step above that it calls."""

    def step(self, closure=None):
        return super().step(closure)


def a_step_that_calls_the_one_above():
    model = network()
    assert sgd(model)  # torch wraps the step of the class above
    inside = Above(model.parameters(), lr=1e-3)
    optimizer = NormClip.as_optimizer(inside, max_norm=1.0)
    train(model, optimizer.step)


def scheduled():
    """A scheduler wraps `step` on the object."""
    model = network()
    clipper = attached(model, optimizer := sgd(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer.step, scheduler.step, clipper.metrics)


def all_copied_and_attached_again():
    model = network()
    clipper = attached(model, optimizer := sgd(model))
    train(model, optimizer.step, count=2)
    model, optimizer, clipper = copy.deepcopy((model, optimizer, clipper))
    clipper.attach(optimizer)
    train(model, optimizer.step)


def a_critic_that_freezes_the_generator():
    """Before the first step of the clipper, the critic takes several."""
    model = network()
    generator, critic = model
    first, second = sgd(generator), sgd(critic)
    clipped = NormClip.as_optimizer(first, max_norm=1.0, model=model)
    for _ in range(3):
        generator.requires_grad_(False)
        train(model, second.step, count=5)
        generator.requires_grad_(True)
        train(model, clipped.step, count=1)


def an_optimizer_for_each_layer():
    model = network()
    optimizers = [sgd(layer) for layer in model]
    for layer, optimizer in zip(model, optimizers, strict=True):
        attached(layer, optimizer)
    train(model, *(optimizer.step for optimizer in optimizers))


def overflows():
    """The scaler skips steps."""
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    clipper, optimizer = clipper_of(model), sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        scaler.scale((model(torch.ones(2, 4)) - 1e3).square().mean()).backward()
        clipper.step(scaler=scaler, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()


def trust():
    model = network()
    optimizer = TrustClip.as_optimizer(sgd(model))
    train(model, optimizer.step)


SILENT = [
    a_clipper_for_each_part,
    gradients_that_are_missing_at_times,
    an_excluded_part,
    a_removed_part,
    a_replaced_parameter,
    several_optimizers,
    adversaries,
    an_encoder_in_two_optimizers,
    an_encoder_in_two_optimizers_by_hand,
    changed_by_hand,
    without_gradient,
    tied,
    frozen_and_unfrozen,
    clipped_at_first,
    detached,
    detached_parts,
    swapped_with_its_clipper,
    one_of_two_models,
    masters_that_receive_clipped_gradients,
    masters_that_share_gradients,
    masters_with_views_of_gradients,
    twins_of_which_one_is_stepped_by_hand,
    a_layer_that_is_updated_more_often,
    a_twin_that_is_not_clipped,
    a_twin_that_is_updated_less_often,
    wrappers_by_turns,
    a_step_that_calls_the_one_above,
    scheduled,
    all_copied_and_attached_again,
    a_critic_that_freezes_the_generator,
    an_optimizer_for_each_layer,
    overflows,
    trust,
]


@pytest.mark.parametrize("scenario", SILENT, ids=lambda each: each.__name__)
def test_a_legitimate_use_is_silent(scenario):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scenario()


def test_a_head_of_the_model_that_the_clipper_did_not_get_is_clipped():
    """It was added before the optimizer was made."""
    model = network()
    clipper = clipper_of(model, scope="parameter")
    model.append(nn.Linear(2, 2))
    clipper.attach(optimizer := sgd(model))
    train(model, optimizer.step, count=1)
    assert set(map(id, clipper.parameters)) == set(map(id, model.parameters()))
    assert model[2].weight.grad.norm() == pytest.approx(1.0)
