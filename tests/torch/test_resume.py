"""2N steps equal N steps, a file, a new process and N more steps, bit for bit.

A run is a model, its optimizer and its clipper. There is one run per policy, one per
scope and one per named clipper. Each format saves all runs in one file, and one new
process continues all files. `test_checkpoint.py` tests what a state holds and what is
refused.
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

from ..conftest import is_installed
from ..support.cases import POLICIES, policy_of
from ..support.torch_models import CLIPPERS, SCOPES, check_same, small_model

N = 10
# The policy decides which arrays a state has, the scope only how many rows they have:
# the policies take turns at the scopes, and one policy runs at each.
RUNS = {
    f"{code}, {scope}": (code, scope)
    for number, code in enumerate(POLICIES)
    for scope in (SCOPES if number == 0 else [SCOPES[number % len(SCOPES)]])
}
RUNS |= {name: (name, None) for name in CLIPPERS}


def noise(steps):
    """Yield gradients with heavy tails, for each step and parameter."""
    rng = torch.Generator().manual_seed(0)
    shapes = [parameter.shape for parameter in small_model().parameters()]
    for _ in range(steps):
        size = torch.randn((), generator=rng).exp()
        yield [size * torch.randn(shape, generator=rng) for shape in shapes]


DATA = list(noise(2 * N))


class Run(NamedTuple):
    """The objects of a training script; if `clipper` is None, the optimizer clips."""

    model: Any
    optimizer: Any
    clipper: Any = None

    def train(self, data):
        """Train; return the last gradients, after clipping."""
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
    """Return a run whose clipper is separate from its optimizer."""
    model, (code, scope) = small_model(seed), RUNS[name]
    if scope is None:
        clipper = CLIPPERS[code](model)
    else:
        clipper = Clipper(model, policy_of(code), scope=scope)
    return Run(model, torch.optim.SGD(model.parameters(), lr=0.02), clipper)


def as_optimizer(name, seed=0):
    """Return the same run with a clipper that is the optimizer."""
    model, (code, scope) = small_model(seed), RUNS[name]
    sgd = torch.optim.SGD(model.parameters(), lr=0.02)
    if scope is None:
        case = CLIPPERS[code]
        keywords = dict(case.keywords)
        policy = [keywords.pop("policy")] if "policy" in keywords else []
        return Run(model, case.make.as_optimizer(sgd, *policy, **keywords))
    return Run(model, Clipper.as_optimizer(sgd, policy_of(code), scope=scope))


# The formats: each writes all runs to one file and reads them from it.


def states_of(runs):
    return {name: run.state() for name, run in runs.items()}


def other_runs(names, start):
    """Return runs with other weights and another history, to load states into."""
    runs = {name: start(name, seed=7) for name in names}
    for run in runs.values():
        run.train(DATA[3:5])
    return runs


def loaded(states, start):
    """Return other runs after they loaded these states."""
    runs = other_runs(states, start)
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
    """Save numbered tensors, and everything else as JSON in the file's metadata."""
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


# DCP warns if there is only one process.
ONE_PROCESS = partial(warnings.catch_warnings, action="ignore")


def checkpointed(runs):
    """Return the models' states and the clippers; plain SGD has no state."""
    clippers = {f"{name}: clipper": run.clipper for name, run in runs.items()}
    return clippers | {name: run.model.state_dict() for name, run in runs.items()}


def save_dcp(runs, path):
    with ONE_PROCESS():
        dcp.save(checkpointed(runs), checkpoint_id=path)


def load_dcp(path, start):
    runs = other_runs(RUNS, start)
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
if not is_installed("safetensors"):
    del FORMATS["safetensors"]


# Two processes.


def runs_after_n_steps(start):
    """Return all runs after N steps."""
    runs = {name: start(name) for name in RUNS}
    for run in runs.values():
        run.train(DATA[:N])
    return runs


def rest_of(runs):
    """Train all runs for N more steps; return their last gradients and states."""
    return {name: (run.train(DATA[N:]), run.state()) for name, run in runs.items()}


def resume(folder):
    """Continue all runs, in the new process."""
    torch.set_num_threads(1)
    for name, form in FORMATS.items():
        runs = form.load(pathlib.Path(folder) / name, form.start)
        torch.save(rest_of(runs), pathlib.Path(folder) / f"{name}, resumed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return, for each format, the uninterrupted runs and the resumed ones."""
    folder, whole = tmp_path_factory.mktemp("resume"), {}
    for start in (plain, as_optimizer):
        runs = runs_after_n_steps(start)
        for name, form in FORMATS.items():
            if form.start is start:
                form.save(runs, folder / name)
        whole[start] = rest_of(runs)
    code = f"import sys; from {__name__} import resume; resume(sys.argv[1])"
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, folder], cwd=root, check=True)
    return {
        name: (whole[form.start], torch.load(folder / f"{name}, resumed"))
        for name, form in FORMATS.items()
    }


@pytest.mark.parametrize("form", FORMATS)
def test_all_runs_resume_in_a_new_process_bit_for_bit(outcomes, form):
    whole, resumed = outcomes[form]
    check_same(resumed, whole, form)


def test_the_runs_differ_from_each_other_and_clip(outcomes):
    """The control: the runs are not copies of one run, and they do clip."""
    whole, _ = outcomes["torch.save"]
    weights = [state["model"]["0.weight"].tolist() for _, state in whole.values()]
    assert len({str(w) for w in weights}) > len(RUNS) / 2
    clipped = [s["clipper"]["tally"]["clipped"].sum() > 0 for _, s in whole.values()]
    assert sum(clipped) > 0.9 * len(RUNS)
