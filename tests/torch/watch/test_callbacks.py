"""`on_clip` and `on_skip`: in which steps each clipper calls them, and with what."""

import copy
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import Decision, Drop, Fixed
from autoclip_torch import (
    Clipper,
    NormClip,
    QuantileClip,
    TrustClip,
    UpdateClipper,
    ValueClip,
)
from autoclip_torch.step import callbacks
from autoclip_torch.trainers.create_clipper import create_clipper

from ...support.torch_device import looks_counted, nothing_read, watched

NAN = float("nan")
NORMS = [1.0, 50.0, 1.0, NAN, 60.0, 1.0]
LIMIT = 10.0


class Call(NamedTuple):
    """What a function was called with, and the weight and its gradient then."""

    step: int
    norms: list
    names: list
    gradient: float | None
    weight: float


class Run:
    """One weight and its optimizer; a step from 0 gives minus the gradient."""

    def __init__(self, **options):
        self.weight = nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0, **options)
        self.clips, self.skips = [], []
        self.functions = {
            "on_clip": lambda *given: self.clips.append(self.read(*given)),
            "on_skip": lambda *given: self.skips.append(self.read(*given)),
        }

    def read(self, decision, names, step):
        assert all(type(field) is torch.Tensor for field in decision)
        gradient = self.weight.grad
        return Call(
            step,
            decision.norm.tolist(),
            names,
            None if gradient is None else gradient.item(),
            self.weight.item(),
        )

    def train(self, step, norms=NORMS, before=lambda: None):
        """Step on gradients of these norms; the weight is 0 before each step."""
        for norm in norms:
            before()
            with torch.no_grad():
                self.weight.zero_()
            self.weight.grad = torch.tensor([norm])
            step()


def by_hand(run, make):
    clipper = make([run.weight], **run.functions)
    return clipper, lambda: (clipper.step(), run.optimizer.step())


def by_attributes(run, make):
    clipper = make([run.weight])
    clipper.on_clip, clipper.on_skip = run.functions.values()
    return clipper, lambda: (clipper.step(), run.optimizer.step())


def attached(run, make):
    clipper = make([run.weight], **run.functions)
    clipper.attach(run.optimizer)
    return clipper, run.optimizer.step


def with_a_closure(run, make):
    clipper = make([run.weight], **run.functions)
    clipper.attach(run.optimizer)
    return clipper, lambda: run.optimizer.step(lambda: 0.0)


def as_an_optimizer(run, make):
    class Maker:
        def __new__(cls, groups, **keywords):
            return make(groups, **keywords)

    optimizer = Clipper.as_optimizer.__func__(Maker, run.optimizer, **run.functions)
    return optimizer.clipper, optimizer.step


WAYS = [by_hand, by_attributes, attached, with_a_closure, as_an_optimizer]


def norm_clip(parameters, **keywords):
    return NormClip(parameters, LIMIT, **keywords)


def value_clip(parameters, **keywords):
    return ValueClip(parameters, LIMIT, scope="global", **keywords)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("make", [norm_clip, value_clip])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
def test_every_way_to_clip_calls_them_in_the_same_steps(way, make, options, nonfinite):
    run = Run(**options)
    clipper, step = way(run, lambda p, **k: make(p, nonfinite=nonfinite, **k))
    run.train(step)
    expected = [1, 4] if nonfinite == "skip" else [1, 3, 4]
    assert [call.step for call in run.clips] == expected
    assert [call.step for call in run.skips] == [3] * (nonfinite == "skip")
    for call in run.clips + run.skips:
        assert call.names == ["global"]
        np.testing.assert_array_equal(call.norms, [NORMS[call.step]])
        assert call.weight == 0, "the optimizer has not stepped"
    kernel_scales = options and make is norm_clip and way in (attached, with_a_closure)
    if not kernel_scales:
        gradients = {1: LIMIT, 3: 0.0, 4: LIMIT}
        assert [call.gradient for call in run.clips] == [gradients[i] for i in expected]
    assert clipper.metrics()["clip/steps"] == len(NORMS)


def test_an_update_clipper_calls_it_after_the_weights_were_clipped():
    run = Run()
    on_clip = run.functions["on_clip"]
    policy = Fixed(LIMIT)
    clipper = UpdateClipper(None, run.optimizer, policy, on_clip=on_clip)
    with pytest.warns(UserWarning, match="an update was not finite"):
        run.train(run.optimizer.step)
    assert [call.step for call in run.clips] == [1, 3, 4]
    assert [call.weight for call in run.clips] == [-LIMIT, 0.0, -LIMIT]
    assert [call.names for call in run.clips] == [clipper.names] * 3


def test_both_halves_of_a_trust_clip_call_it():
    """The filter has the quantiles 1, 30.4 and 44.2; the bound is 0.02 * 0.1."""
    run = Run()
    clipper = TrustClip(None, run.optimizer, quantile=0.6, **run.functions)
    run.train(run.optimizer.step, norms=[1.0, 50.0, 1.0, 60.0])
    halves = {"filter": ["global"], "bound": clipper.names}
    steps = {
        half: [call.step for call in run.clips if call.names == names]
        for half, names in halves.items()
    }
    assert steps == {"filter": [1, 3], "bound": [0, 1, 2, 3]}
    assert [call.step for call in run.clips] == [0, 1, 1, 2, 3, 3], "the filter first"
    clipper.on_clip = None
    assert clipper.on_clip is None
    assert clipper.on_skip is run.functions["on_skip"]
    run.train(run.optimizer.step, norms=[100.0])
    assert len(run.clips) == 6


@pytest.mark.parametrize(
    "keywords",
    [
        {"policy": Drop(Fixed(LIMIT), action="skip")},
        {"policy": Fixed(1e9), "loss_policy": Fixed(LIMIT)},
    ],
    ids=["drop", "loss"],
)
def test_whatever_skips_the_update_calls_on_skip(keywords):
    run = Run()
    clipper = Clipper([run.weight], **keywords, **run.functions)

    def step():
        norm = run.weight.grad.item()
        clipper.step(loss=norm if "loss_policy" in keywords else None)

    run.train(step, norms=[1.0, 50.0, 1.0])
    assert not run.clips
    assert [(call.step, call.gradient) for call in run.skips] == [(1, None)]


def test_the_step_that_ends_the_run_calls_it_first():
    run = Run()
    how = {"nonfinite": "skip", "max_consecutive_skips": 1}
    clipper = NormClip([run.weight], LIMIT, **how, **run.functions)
    with pytest.raises(RuntimeError, match="2 updates in a row were skipped"):
        run.train(clipper.step, norms=[1.0, NAN, NAN])
    assert [call.step for call in run.skips] == [1, 2]


def test_a_dry_run_and_an_observed_step_call_them_and_a_series_does_not():
    run = Run()
    clipper = NormClip([run.weight], LIMIT, dry_run=True, **run.functions)
    run.train(clipper.step, norms=[1.0, 50.0])
    assert [(call.step, call.gradient) for call in run.clips] == [(1, 50.0)]
    clipper.observe(70.0)
    clipper.observe([80.0, 90.0])
    assert [(call.step, call.norms) for call in run.clips[1:]] == [(2, [70.0])]


def test_steps_are_numbered_as_the_counts_of_a_resumed_run():
    first, second = Run(), Run()
    clipper = norm_clip([first.weight])
    first.train(clipper.step, norms=[1.0, 50.0])
    resumed = norm_clip([second.weight], **second.functions)
    resumed.load_state_dict(clipper.state_dict())
    second.train(resumed.step, norms=[50.0])
    assert [call.step for call in second.clips] == [2]


# The rest of a step, without them and if they fail.


def fail(decision, names, step):
    raise KeyError(step)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("way", WAYS)
def test_an_exception_leaves_a_whole_step(way, options):
    """The run continues with the thresholds of a run in which nothing failed."""

    def make(parameters, **keywords):
        return QuantileClip(
            parameters, 0.5, history_length=4, scope="global", **keywords
        )

    expected, run = Run(**options), Run(**options)
    whole, step = way(expected, make)
    expected.train(step)
    run.functions["on_clip"] = fail
    clipper, step = way(run, make)
    failed = []

    def step_and_catch():
        try:
            step()
        except KeyError as error:
            failed.append(error.args[0])
            assert run.weight.item() == 0, "the optimizer has not stepped"

    run.train(step_and_catch)
    assert failed == [call.step for call in expected.clips] == [1, 3, 4]
    assert clipper.metrics(per_row=True) == whole.metrics(per_row=True)
    assert torch.equal(run.weight, expected.weight)
    states = (torch.cat([t.flatten() for t in c.state_dict()["states"][0].values()])
              for c in (clipper, whole))  # fmt: skip
    assert torch.equal(*states)


def test_an_exception_after_an_update_leaves_clipped_weights():
    run = Run()
    clipper = UpdateClipper(None, run.optimizer, Fixed(LIMIT), on_clip=fail)
    with pytest.raises(KeyError):
        run.train(run.optimizer.step, norms=[1.0, 50.0])
    assert run.weight.item() == -LIMIT
    assert clipper.metrics()["clip/update_steps"] == 2
    run.train(run.optimizer.step, norms=[1.0])
    assert run.weight.item() == -1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_copy_has_no_functions_and_a_state_dict_ignores_them(copied):
    run = Run()
    clipper = norm_clip([run.weight])
    run.train(clipper.step)
    saved = str(clipper.state_dict())
    clipper.on_clip = lambda decision, names, step: None  # pickle cannot hold it
    assert str(clipper.state_dict()) == saved
    other = copied(clipper)
    assert other.on_clip is None
    assert other.on_skip is None
    assert other.metrics() == clipper.metrics()


def test_the_function_that_trainers_make_clippers_with_takes_them():
    run = Run()
    model = nn.ParameterList([run.weight])
    clipper = create_clipper(norm_clip, run.functions, [run.optimizer], model)
    run.train(clipper.step)
    assert [call.step for call in run.clips] == [1, 3, 4]


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"on_clip must be a function of \(decision, "):
        norm_clip([Run().weight], on_clip="print")


# On an accelerator.


@pytest.fixture
def deferred(monkeypatch):
    """Treat tensors of the device path as those of an accelerator."""
    monkeypatch.setattr(callbacks, "is_on_cpu", lambda states: states.device is None)


def test_on_a_device_they_are_called_before_the_next_step_ends(deferred):
    weight, calls = nn.Parameter(torch.zeros(2)), []
    clipper = QuantileClip([weight], 0.5, on_clip=lambda *given: calls.append(given))

    def step(norm):
        weight.grad = watched(torch.tensor([norm, 0.0]))
        clipper.step()

    with nothing_read():
        step(1.0)
    with looks_counted():
        step(50.0)
        assert not calls
        step(1.0)
        [(decision, names, number)] = calls
        assert (names, number) == (clipper.names, 1)
        wanted = Decision([50.0], [1.0], [1 / 50], [True], [True], [False], [False])
        for field, values in zip(decision, wanted, strict=True):
            assert type(field) is torch.Tensor
            torch.testing.assert_close(field, torch.tensor(values))
        step(NAN)
        assert len(calls) == 1
        clipper.metrics()
        assert [call[2] for call in calls] == [1, 3]
        clipper.metrics()
        assert len(calls) == 2, "once"


def test_on_a_device_a_skipped_step_is_read_after_the_next_one(deferred):
    weight, steps = nn.Parameter(torch.zeros(1)), []
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    clipper = Clipper([weight], Drop(Fixed(LIMIT), action="skip"))
    clipper.on_skip = lambda decision, names, step: steps.append(step)
    clipper.attach(optimizer)
    with looks_counted():
        for norm, expected in [(50.0, []), (1.0, [0]), (1.0, [0])]:
            weight.grad = watched(torch.tensor([norm]))
            optimizer.step()
            assert steps == expected


def test_on_a_device_an_exception_comes_after_the_next_step(deferred):
    weight, steps = nn.Parameter(torch.zeros(1)), []

    def on_clip(decision, names, step):
        steps.append(step)
        raise KeyError(step)

    clipper = NormClip([weight], LIMIT, on_clip=on_clip)

    def step(norm):
        weight.grad = watched(torch.tensor([norm]))
        clipper.step()

    with looks_counted():
        step(50.0)
        with pytest.raises(KeyError):
            step(60.0)
        assert weight.grad.item() == LIMIT
        assert steps == [0]
        with pytest.raises(KeyError):
            clipper.metrics()
        assert steps == [0, 1]
        assert clipper.metrics()["clip/steps"] == 2


def test_a_policy_that_moves_to_the_cpu_calls_them_in_order(deferred):
    weight, steps = nn.Parameter(torch.zeros(1)), []
    clipper = NormClip(
        [weight], LIMIT, on_clip=lambda d, names, step: steps.append(step)
    )
    with looks_counted():
        weight.grad = watched(torch.tensor([50.0]))
        clipper.step()
        assert steps == []
        weight.grad = torch.tensor([60.0])
        clipper.step()
    assert steps == [0, 1]


def test_the_page_shows_how_to_keep_the_batch_that_spiked(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs" / "watching.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    [code] = [block for block in blocks if "on_clip" in block]
    run = Run()
    batches = [torch.tensor([norm]) for norm in [1.0, 50.0, 1.0]]
    namespace = {
        "clipper": norm_clip([run.weight]),
        "optimizer": run.optimizer,
        "loader": batches,
        "loss_of": lambda batch: (batch * run.weight).sum(),
    }
    exec(compile(code, "watching.md", "exec"), namespace)
    assert torch.load("batch_1.pt") == 50
    assert [path.name for path in tmp_path.iterdir()] == ["batch_1.pt"]
    assert capsys.readouterr().out == "step 1: global has the norm 50\n"
