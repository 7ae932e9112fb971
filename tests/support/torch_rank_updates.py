"""Cases of `torch_ranks.py`: updates without a clip, on one rank or on all of them."""

import contextlib
import gc
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from autoclip_core import Fixed, ParamRatio
from autoclip_torch import AGC, NormClip, TrustClip, UpdateClipper
from autoclip_torch.gradients.step_counter import StepCounter

from .torch_layouts import LAYOUTS, RUNS, Net, batch, fsdp
from .torch_rank_steps import message_of, stage

LEFT_OUT = 2
"""The last rank leaves out the clip of this step, counted from 0."""

CLIPPERS = {
    "global": lambda m: NormClip(m, 0.5),
    "parameter": lambda m: NormClip(m, 0.5, scope="parameter"),
    "weights": lambda m: AGC(m, 0.02),
    "largest": lambda m: NormClip(m, 0.5, norm="max"),
    "losses": lambda m: NormClip(m, 0.5, loss_policy=Fixed(1e9)),
    "dry run": lambda m: NormClip(m, 0.5, dry_run=True),
    "errors": lambda m: NormClip(m, 0.5, nonfinite="raise"),
}


def is_last():
    return dist.get_rank() == dist.get_world_size() - 1


def backward(model, step):
    x, y = batch(step)
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def clip(clipper):
    clipper.step(**({} if clipper.loss_policy is None else {"loss": 1.0}))


def make(layout=fsdp, clipper=CLIPPERS["global"]):
    torch.manual_seed(0)
    net = Net()
    model = layout(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return model, optimizer, clipper(net)


def local_weights(model):
    return [getattr(p, "_local_tensor", p).tolist() for p in model.parameters()]


def leave_out(model, optimizer, clipper, left_out=LEFT_OUT):
    """Train, and leave out one clip on the last rank; return what every rank does."""
    weights = []

    def train():
        for step in range(5):
            backward(model, step)
            weights[:] = local_weights(model)
            if not (is_last() and step == left_out):
                clip(clipper)
            optimizer.step()

    error = message_of(train)
    return {"error": error, "unchanged": weights == local_weights(model)}


def a_left_out_clip():
    """Real forward passes; the ranks would wait for each other without a check."""
    world = dist.get_world_size()
    layouts = dict.fromkeys(layout for size, layout, _ in RUNS if size == world)
    layouts.pop("ddp", None)
    found = {name: leave_out(*make(LAYOUTS[name])) for name in layouts}
    for name, clipper in CLIPPERS.items():
        found[name] = leave_out(*make(fsdp, clipper))
    return {"found": found}


def a_left_out_clip_of_sharded_stages():
    """Each stage is sharded over two ranks; their norms are summed in two groups."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))

    def clipper(model):
        return NormClip(model, 0.5, process_group=mesh["stage"].get_group())

    def shard(model):
        fully_shard(model.a, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    return leave_out(*make(shard, clipper))


@contextlib.contextmanager
def listing_reductions():
    """Yield a list of the reasons of the reductions of all clippers."""
    calls, reduce, average = [], StepCounter.reduce, StepCounter.average

    def counted(self, *arguments, reason="step", **keywords):
        calls.append(reason)
        return reduce(self, *arguments, reason=reason, **keywords)

    def averaged(*arguments):
        calls.append("loss")
        return average(*arguments)

    with mock.patch.multiple(StepCounter, reduce=counted, average=averaged):
        yield calls


def train(loop, clips, steps=8):
    """Train, with a clip in some of the steps."""
    model, optimizer, clipper = loop
    for step in range(steps):
        backward(model, step)
        if step in clips:
            clip(clipper)
        optimizer.step()


def a_clip_in_every_second_step():
    train(make(), range(0, 8, 2))


def clips_that_begin_later():
    train(make(), range(4, 8))


def clips_that_end():
    train(make(), range(4))


def losses():
    train(make(clipper=CLIPPERS["losses"]), range(0, 8, 2))


def two_optimizers():
    """The second one steps the same parameters without a clip, on purpose."""
    model, optimizer, clipper = make()
    other = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(4):
        backward(model, step)
        clipper.step()
        optimizer.step()
        other.step()


def a_closure():
    model, optimizer, clipper = make()
    for step in range(4):

        def closure(step=step):
            backward(model, step)
            clipper.step()
            return torch.zeros(())

        optimizer.step(closure)


def attached():
    model, optimizer, clipper = make()
    clipper.attach(optimizer)
    train((model, optimizer, clipper), ())


def attached_and_by_hand():
    """The first update of an attached clipper begins without a clip."""
    _, optimizer, clipper = loop = make()
    train(loop, range(3), 3)
    clipper.attach(optimizer)
    train(loop, (), 3)
    clipper.detach()
    train(loop, range(3), 3)


class Nested(torch.optim.SGD):
    """torch runs the hooks in the step of each class."""

    def step(self, closure=None):
        return super().step(closure)


def steps_that_call_super():
    for is_attached in (False, True):
        model, _, clipper = make()
        optimizer = Nested(model.parameters(), lr=0.1)
        if is_attached:
            clipper.attach(optimizer)
        train((model, optimizer, clipper), () if is_attached else range(8))


class Outer(torch.optim.Optimizer):
    """It steps another optimizer of the same parameters."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


def an_optimizer_in_another():
    model, inner, clipper = make()
    train((model, Outer(inner), clipper), range(8))


def as_optimizer():
    torch.manual_seed(0)
    model = fsdp(Net())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    train((model, NormClip.as_optimizer(sgd, 0.5, model=model), None), ())


def updates_that_are_clipped():
    for clipper in (
        lambda *of: UpdateClipper(*of, ParamRatio(0.01, eps=0.1)),
        TrustClip,
    ):
        torch.manual_seed(0)
        model = fsdp(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper(model, optimizer)
        train((model, optimizer, None), ())


def a_scaler_that_overflows():
    """All ranks leave out the update of the second step."""
    model, optimizer, clipper = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        if step == 1 and is_last():
            model.a.weight.grad.to_local()[0, 0] = float("inf")
        clipper.step(scaler=scaler, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()


def an_update_that_one_rank_repeats():
    """Its first attempt fails, as for lack of memory, in an update without a clip."""
    model, optimizer, clipper = make()
    for step in range(8):
        backward(model, step)
        if step % 2 == 0:
            clipper.step()
        if step > 2 and is_last():

            def fail(*_):
                raise MemoryError

            handle = optimizer.register_step_pre_hook(fail)
            with contextlib.suppress(MemoryError):
                optimizer.step()
            handle.remove()
        optimizer.step()


def a_clipper_that_one_rank_keeps():
    """Each phase has a new clipper; the garbage collector deletes the old one."""
    kept = []
    torch.manual_seed(0)
    model = fsdp(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        clipper = NormClip(model, 0.5)
        if is_last():
            kept.append(clipper)
        else:
            gc.collect()
        for step in range(4):
            backward(model, step)
            clipper.step()
            optimizer.step()


def the_state_of_a_checkpoint():
    """One rank alone reads the state of an optimizer without one: torch steps it."""
    model, optimizer, clipper = make()
    for step in range(8):
        backward(model, step)
        if step % 2 == 0:
            clipper.step()
        optimizer.step()
        if is_last():
            optimizer.zero_grad()
            get_optimizer_state_dict(model, optimizer)


def the_state_of_a_new_optimizer():
    """One rank alone creates it by a step without gradients, and with lr=0."""
    model, optimizer, clipper = make()
    for _ in range(4):
        if is_last():
            optimizer.zero_grad()
            torch.optim.SGD(model.parameters(), lr=0.0).step()
        train((model, optimizer, clipper), range(1), 1)


def a_change_of_rows():
    model, optimizer, clipper = make(clipper=CLIPPERS["parameter"])
    for step in range(8):
        if step == 5:
            clipper.remove_params([model.d.weight])
        backward(model, step)
        if step % 4 == 0:
            clipper.step()
        optimizer.step()


UPDATE = "optimizer.step() without clipper.step()"
PROGRAMS = {
    a_clip_in_every_second_step: 3,
    clips_that_begin_later: 0,
    clips_that_end: 1,
    losses: 3,
    two_optimizers: 0,
    a_closure: 0,
    attached: 0,
    attached_and_by_hand: 1,
    steps_that_call_super: 0,
    an_optimizer_in_another: 0,
    as_optimizer: 0,
    updates_that_are_clipped: 0,
    a_scaler_that_overflows: 0,
    an_update_that_one_rank_repeats: 3,
    a_clipper_that_one_rank_keeps: 2,
    the_state_of_a_checkpoint: 3,
    the_state_of_a_new_optimizer: 0,
    a_change_of_rows: 1,
}
"""How many updates without a clip each program checks. Its ranks do the same."""


def right_programs():
    """Return the error of each program, and its reductions outside of a clip."""
    found = {}
    for program in PROGRAMS:
        with listing_reductions() as reasons:
            error = message_of(program)
        alone = [each for each in reasons if each != "step"]
        found[program.__name__] = {"error": error, "reasons": alone}
    return {"found": found}


def a_stage_with_two_optimizers():
    """On its rank no optimizer steps all parameters, so no rank checks an update."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(3, 5), mesh=mesh["data"])
    clipper = NormClip(model, 0.5, process_group=mesh["stage"].get_group())
    parameters = [*model.parameters()]
    parts = [parameters] if mesh.get_local_rank("stage") else [[p] for p in parameters]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
    for step in range(8):
        for p in parameters:
            p.grad = torch.full_like(p, 0.5)
        if step % 2 == 0:
            clipper.step()
        for optimizer in optimizers:
            optimizer.step()
    return {"steps": clipper.metrics()["clip/steps"]}


def a_rank_that_does_not_step():
    """Return what the error of the others says, after a short timeout."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    clipper = NormClip(stage(), 1.0, process_group=group)
    clipper.step()
    notes = []
    if dist.get_rank() == 0:
        try:
            clipper.step()
        except RuntimeError as error:
            notes = error.__notes__
    dist.barrier()
    return {"notes": notes}


EVERY_WORLD = [a_left_out_clip]
OF_TWO = [right_programs, a_rank_that_does_not_step]
OF_FOUR = [a_left_out_clip_of_sharded_stages, a_stage_with_two_optimizers]
