"""2N steps are N steps, a file, a new process and N more, bit for bit, in every format.

Each policy at each scope, and each named clipper, is a run: a model, its optimizer and
its clipper. All runs go into one file per format, and one new process goes on from all
files; `test_torch_checkpoint.py` says what a state is made of and what is refused.
"""

import json
import pathlib
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp

from autoclip_torch import Clipper

from ..conftest import found
from ..support.cases import POLICIES, policy_of
from ..support.torch_models import CLIPPERS, SCOPES, check_same, small_model

N = 10
RUNS = {f"{code}, {scope}": (code, scope) for code in POLICIES for scope in SCOPES}
RUNS |= {name: (name, None) for name in CLIPPERS}


def noise(steps):
    """Gradients of heavy tails for each step and parameter."""
    rng = torch.Generator().manual_seed(0)
    shapes = [parameter.shape for parameter in small_model().parameters()]
    for _ in range(steps):
        size = torch.randn((), generator=rng).exp()
        yield [size * torch.randn(shape, generator=rng) for shape in shapes]


DATA = list(noise(2 * N))


class Run(NamedTuple):
    """What a script trains with; without a clipper the optimizer clips."""

    model: Any
    optimizer: Any
    clipper: Any = None

    def go_on(self, data):
        """Train; return the last gradients as they were left."""
        for grads in data:
            for weight, grad in zip(self.model.parameters(), grads, strict=True):
                weight.grad = grad + weight.detach()
            if self.clipper is not None:
                self.clipper.step()
            self.optimizer.step()
        return [parameter.grad for parameter in self.model.parameters()]

    def parts(self):
        return {name: part for name, part in self._asdict().items() if part is not None}

    def state(self):
        return {name: dict(part.state_dict()) for name, part in self.parts().items()}

    def load(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def plain(name, seed=0):
    """A clipper beside its optimizer."""
    model, (what, scope) = small_model(seed), RUNS[name]
    if scope is None:
        clipper = CLIPPERS[what](model)
    else:
        clipper = Clipper(model, policy_of(what), scope=scope)
    return Run(model, torch.optim.SGD(model.parameters(), lr=0.02), clipper)


def as_optimizer(name, seed=0):
    """The same clipper, which is the optimizer."""
    model, (what, scope) = small_model(seed), RUNS[name]
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    if scope is None:
        case = CLIPPERS[what]
        keywords = dict(case.keywords)
        policy = [keywords.pop("policy")] if "policy" in keywords else []
        return Run(model, case.make.as_optimizer(sgd, *policy, **keywords))
    return Run(model, Clipper.as_optimizer(sgd, policy_of(what), scope=scope))


# The formats: each writes all runs into one file, and reads them from there.


def states_of(runs):
    return {name: run.state() for name, run in runs.items()}


def elsewhere(names, start):
    """Runs that began in another place, and took another way."""
    runs = {name: start(name, seed=7) for name in names}
    for run in runs.values():
        run.go_on(DATA[3:5])
    return runs


def loaded(states, start):
    """Runs that began elsewhere, with these states."""
    runs = elsewhere(states, start)
    for name, run in runs.items():
        run.load(states[name])
    return runs


def save(runs, path):
    torch.save(states_of(runs), path)


def load(path, start):
    return loaded(torch.load(path, weights_only=True), start)


def save_pickle(runs, path):
    path.write_bytes(pickle.dumps(runs))


def load_pickle(path, start):
    return pickle.loads(path.read_bytes())


def save_safetensors(runs, path):
    """Tensors by their number, and what remains as JSON beside them."""
    from safetensors.torch import save_file

    tensors = {}

    def without_tensors(node):
        if isinstance(node, torch.Tensor):
            tensors[str(len(tensors))] = node
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(node, dict):
            return {"dict": [[k, without_tensors(v)] for k, v in node.items()]}
        if isinstance(node, list | tuple):
            return {type(node).__name__: [without_tensors(part) for part in node]}
        return node

    rest = json.dumps(without_tensors(states_of(runs)))
    save_file(tensors, path, metadata={"rest": rest})


def load_safetensors(path, start):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:

        def with_tensors(node):
            if not isinstance(node, dict):
                return node
            [(kind, inside)] = node.items()
            if kind == "tensor":
                return file.get_tensor(inside)
            if kind == "dict":
                return {key: with_tensors(part) for key, part in inside}
            return {"list": list, "tuple": tuple}[kind](map(with_tensors, inside))

        states = with_tensors(json.loads(file.metadata()["rest"]))
    return loaded(states, start)


# DCP warns that there is one process.
ONE_PROCESS = partial(warnings.catch_warnings, action="ignore")


def checkpointed(runs):
    """Models' states, and the clippers as they are; plain SGD has no state."""
    clippers = {f"{name}: clipper": run.clipper for name, run in runs.items()}
    return clippers | {name: run.model.state_dict() for name, run in runs.items()}


def save_dcp(runs, path):
    with ONE_PROCESS():
        dcp.save(checkpointed(runs), checkpoint_id=path)


def load_dcp(path, start):
    runs = elsewhere(RUNS, start)
    parts = checkpointed(runs)
    with ONE_PROCESS():
        dcp.load(parts, checkpoint_id=path)
    for name, run in runs.items():
        run.model.load_state_dict(parts[name])
    return runs


class Format(NamedTuple):
    start: Callable
    save: Callable
    load: Callable


FORMATS = {
    "torch.save": Format(plain, save, load),
    "pickle": Format(plain, save_pickle, load_pickle),
    "safetensors": Format(plain, save_safetensors, load_safetensors),
    "dcp": Format(plain, save_dcp, load_dcp),
    "as_optimizer": Format(as_optimizer, save, load),
}
if not found("safetensors"):
    del FORMATS["safetensors"]


# Two processes.


def begun(start):
    """All runs after N steps."""
    runs = {name: start(name) for name in RUNS}
    for run in runs.values():
        run.go_on(DATA[:N])
    return runs


def rest_of(runs):
    """The other N steps of all runs: their last gradients, and their states."""
    return {name: (run.go_on(DATA[N:]), run.state()) for name, run in runs.items()}


def resume(folder):
    """Continue all runs, in the new process."""
    torch.set_num_threads(1)
    for name, one in FORMATS.items():
        runs = one.load(pathlib.Path(folder) / name, one.start)
        torch.save(rest_of(runs), pathlib.Path(folder) / f"{name}, resumed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Of each format: the runs that were not interrupted, and those that were."""
    folder, whole = tmp_path_factory.mktemp("resume"), {}
    for start in (plain, as_optimizer):
        runs = begun(start)
        for name, one in FORMATS.items():
            if one.start is start:
                one.save(runs, folder / name)
        whole[start] = rest_of(runs)
    there = f"import sys; from {__name__} import resume; resume(sys.argv[1])"
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", there, folder], cwd=root, check=True)
    return {
        name: (whole[one.start], torch.load(folder / f"{name}, resumed"))
        for name, one in FORMATS.items()
    }


@pytest.mark.parametrize("form", FORMATS)
def test_all_runs_go_on_in_a_new_process_bit_for_bit(outcomes, form):
    whole, resumed = outcomes[form]
    check_same(resumed, whole, form)


def test_the_runs_differ_from_each_other_and_clip(outcomes):
    """The matrix is no repetition of one run; its fault would be noticed."""
    whole, _ = outcomes["torch.save"]
    weights = [state["model"]["0.weight"].tolist() for _, state in whole.values()]
    assert len({str(w) for w in weights}) > len(RUNS) / 2
    clipped = [s["clipper"]["tally"]["clipped"].sum() > 0 for _, s in whole.values()]
    assert sum(clipped) > 0.9 * len(RUNS)
