"""Split one step of a clipper into its parts, beside what the memory allows.

Run it as `python benchmarks/fixed_cost.py`; `--help` tells the options. The parts are
timed one by one, in turns with the whole step, on gradients that were just written. The
limits are one read, and one read and write in place, of as many bytes in one piece: no
step that reads every gradient, or writes it, takes less.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

import command
from autoclip_core import Decision, Fixed, ParamRatio, Quantile, decide
from autoclip_core.metrics import add_step
from autoclip_torch import Clipper
from autoclip_torch.gradients import give_each_its_own, measure, on_host, scale_
from contenders import HISTORY, Contender, Parameters
from models import MODELS, make_parameters, set_gradients, tiny
from timing import alternate

LIMITS = ("clip_grad_norm_", "one read", "one read and write")
CLIPPERS: dict[str, tuple[Any, str]] = {
    "Fixed, global": (Fixed(1e9), "global"),
    "Quantile, global": (Quantile(history_length=HISTORY), "global"),
    "Quantile, per parameter": (Quantile(history_length=HISTORY), "parameter"),
    "AGC, per unit": (ParamRatio(1e9), "unit"),
}
"""None of them clips; what scaling all would take is a part of its own."""


def main() -> None:
    """Print a table per model, and save the numbers where asked to."""
    parser = command.parser(__doc__, seconds=6.0)
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    options = command.parse(parser)
    torch.set_num_threads(options.threads)
    models = {"tiny": tiny} if options.quick else MODELS
    found = {}
    for name, shapes in models.items():
        parameters = make_parameters(shapes())
        found[name] = split(parameters, options.seconds)
        print(f"\n{make_table(name, found[name])}", flush=True)
    command.save(options.json, "torch", threads=options.threads, microseconds=found)


def split(parameters: Parameters, seconds: float) -> dict[str, dict[str, float]]:
    """Return the microseconds of each part of each clipper's step, and the limits."""
    set_gradients(parameters, 1.0)
    contenders = make_limits(parameters)
    for name, (policy, scope) in CLIPPERS.items():
        clipper = Clipper(parameters, policy, scope=scope)
        norms = clipper.step().norm
        if policy.needs_param_norms or isinstance(policy, Fixed):
            clipper.reset()
        else:
            spread = torch.rand(HISTORY, len(norms)) + 1.0
            clipper.observe(2 * norms * spread)
        parts = {"step": clipper.step} | make_parts(clipper)
        contenders += [
            Contender(f"{name}/{part}", step) for part, step in parts.items()
        ]

    def prepare(contender: Contender) -> None:
        contender.restore()
        set_gradients(parameters, 1.0)

    taken = alternate(contenders, prepare, seconds)
    found: dict[str, dict[str, float]] = {}
    for key, times in taken.items():
        name, _, part = key.partition("/")
        found.setdefault(name, {})[part or "step"] = 1e6 * statistics.median(times)
    return found


def make_limits(parameters: Parameters) -> list[Contender]:
    """Return torch's fixed clip, and what memory allows for as many bytes."""
    flat = torch.cat([parameter.detach().view(-1) for parameter in parameters])

    def write() -> None:
        torch.mul(flat, 1.0, out=flat)

    def read_and_scale() -> None:
        torch.dot(flat, flat)
        flat.mul_(0.999)

    names = iter(LIMITS)
    return [
        Contender(next(names), lambda: clip_grad_norm_(parameters, 1e9)),
        Contender(next(names), lambda: torch.dot(flat, flat), write),
        Contender(next(names), read_and_scale, write),
    ]


def make_parts(clipper: Clipper) -> dict[str, Callable[[], Any]]:
    """Return what a step does, one thing after the other, each on its own."""
    learner = clipper._learner
    rows, band = learner.rows, learner.rows.bands[0]
    slots = rows.slots
    weights = [slot.parameter.detach() for slot in slots]

    def walk() -> list[Any]:
        give_each_its_own(slots)
        gradients = [slot.parameter.grad for slot in slots]
        on_host(gradients)
        return gradients

    gradients = walk()
    reads = [gradients, weights] if band.policy.needs_param_norms else [gradients]

    def norms() -> list[Any]:
        return [measure(rows, tensors, None) for tensors in reads]

    (found, observed), *others = norms()
    arguments = {"observed": observed}
    if others:
        arguments["param_norms"] = others[0][0]
    state, decision = decide(band.policy, learner.states[0], found, **arguments)
    scales = 0 * decision.scale + 0.999

    return {
        "walk": walk,
        "norms": norms,
        "decide": lambda: decide(band.policy, state, found, **arguments),
        "count": lambda: add_step(learner.tally, decision),
        "wrap": lambda: Decision(*map(torch.as_tensor, decision)),
        "scale": lambda: scale_(rows, gradients, scales),
    }


def make_table(model: str, found: dict[str, dict[str, float]]) -> str:
    """Return a line per clipper, a column per part, the limits above."""
    lines = [f"{model}: microseconds"]
    lines += [f"  {name:26}{found[name]['step']:10.1f}" for name in LIMITS]
    parts = [name for name in next(iter(found[n] for n in CLIPPERS)) if name != "step"]
    lines.append(f"{'':28}{'step':>10}" + "".join(f"{part:>10}" for part in parts))
    for name in CLIPPERS:
        cells = "".join(f"{found[name][part]:10.1f}" for part in ("step", *parts))
        lines.append(f"  {name:26}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
