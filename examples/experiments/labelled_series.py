"""Labelled series of gradient norms: small real runs with known faults.

`python examples/experiments/labelled_series.py` trains them and writes
tests/support/labelled_series.npz; `diagnosis_table.py` counts the verdicts. A label
comes from the fault and from the run's loss on a test, never from its norms. One seed
is kept from tuning; the seeds differ in the optimizer of each task and fault, too.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiment import run_all
from fault_kinds import FAULTS, Fault
from labelled_tasks import OPTIMIZERS, TASKS, Task, find_rate

FILE = Path(__file__).parents[2] / "tests" / "support" / "labelled_series.npz"

TUNING_SEEDS, KEPT_SEED = (6,), 7
"""The seeds in the file. Seeds 0 to 5 also served for tuning."""

CHECK = 20
"""Steps between two tests of the model."""

LEARNED, GOOD, BAD = 0.1, 0.7, 0.3
"""Of the level: the gain of a model that has learned something. Of the best gain: the
least of a good end, and the most of a bad one."""

LEAST = 50
"""The steps of a healthy part, at least."""


@dataclass(frozen=True)
class Case:
    """What identifies a run."""

    task: str
    optimizer: str
    fault: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the series."""
        return f"{self.task}, {self.optimizer}, {self.fault}, seed {self.seed}"

    @property
    def is_kept(self) -> bool:
        """Whether the series is kept from tuning."""
        return self.seed == KEPT_SEED


def list_cases(seeds: Iterable[int]) -> list[Case]:
    """Return each fault in each task that it fits, under one of the optimizers."""
    return [
        Case(
            task,
            list(OPTIMIZERS)[(number + place + seed) % len(OPTIMIZERS)],
            name,
            seed,
        )
        for seed in seeds
        for number, task in enumerate(TASKS)
        for place, (name, fault) in enumerate(FAULTS.items())
        if fits(TASKS[task], fault)
        and not (TASKS[task].is_slow and (number // 2 + place) % 2)
    ]


def fits(task: Task, fault: Fault) -> bool:
    """Return whether a task can have a fault."""
    if fault.needs_sampling and not task.can_sample:
        return False
    return task.has_float16 or not fault.is_float16


def measure_norm(parameters: list[Any]) -> float:
    """Return the norm of the whole gradient."""
    norms = [p.grad.double().norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


def train(case: Case) -> dict[str, Any]:
    """Return the norms of a run, its test losses, and the steps of its fault."""
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    task, fault = TASKS[case.task], FAULTS[case.fault]
    problem = task.make(case.seed, task.steps)
    parameters = list(problem.model.parameters())
    rate = fault.factor * find_rate(case.task, case.optimizer)
    optimizer = OPTIMIZERS[case.optimizer](parameters, lr=rate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=fault.is_float16)
    rng = np.random.default_rng([case.seed, zlib.crc32(case.name.encode())])
    scales = fault.scales(rng, task.steps)
    norms, losses = [], []
    for step in range(task.steps):
        if step % CHECK == 0:
            losses.append(run_test(problem))
        optimizer.param_groups[0]["lr"] = rate * fault.schedule(step / task.steps)
        optimizer.zero_grad()
        copies = fault.batches(step / task.steps)
        with torch.autocast("cpu", torch.float16, enabled=fault.is_float16):
            loss = sum(problem.loss(step) for _ in range(copies)) / copies
        scaler.scale(loss * float(scales[step])).backward()
        scaler.unscale_(optimizer)
        norms.append(clip(parameters, norms, fault, task.threshold))
        if fault.is_measured_only or (fault.skips and not math.isfinite(norms[-1])):
            continue
        scaler.step(optimizer)
        scaler.update()
        if step == int(fault.damage_at * task.steps):
            damage(problem.model)
    losses.append(run_test(problem))
    return describe(case, np.array(norms), losses, problem.level, scales)


def clip(
    parameters: list[Any], norms: list[float], fault: Fault, threshold: float | None
) -> float:
    """Clip the gradient if task or fault say so, and return the norm that is logged."""
    norm = measure_norm(parameters)
    if fault.clips_at is not None and len(norms) >= fault.clip_from:
        threshold = fault.clips_at * float(np.median(norms[: fault.clip_from]))
    if threshold is None:
        return norm
    torch.nn.utils.clip_grad_norm_(parameters, threshold)
    return measure_norm(parameters) if fault.logs_clipped else norm


@torch.no_grad()
def damage(model: Any) -> None:
    """Multiply the weights of the largest layer by 20, as a bad transfer might."""
    largest = max(model.parameters(), key=torch.numel)
    largest.mul_(20)


@torch.no_grad()
def run_test(problem: Any) -> float:
    """Return the loss on the test."""
    return float(problem.test())


def label(
    case: Case, losses: list[float], level: float, faults: list[int], size: int
) -> tuple[str, int]:
    """Return the label of a run and the end of its healthy part.

    The gain is the level minus the test loss. A run that never gains a tenth of the
    level was never healthy. If it keeps less than 30 % of its best gain at the end, it
    diverged: it was healthy until its last good test, or until
    the fault. With fewer than 50 healthy steps it was never healthy. Between 30 and
    70 % it has no label. Nor has a run with a bad loss whose
    fault is harmless or comes later: its fault is not known.
    """
    fault = FAULTS[case.fault]
    gains = level - np.nan_to_num(np.array(losses), nan=np.inf, posinf=np.inf)
    best, last = gains.max(), np.median(gains[-3:])
    first = math.floor(fault.damage_at * size) + 1 if fault.damage_at > 0 else 0
    first = min(faults) if faults else first
    prefix = "clipped, " if fault.logs_clipped else ""
    if fault.is_measured_only:
        return "healthy", size
    if best < LEARNED * level:
        is_late = first > 2 * CHECK or TASKS[case.task].has_late_test
        is_unclear = is_late or fault.is_harmless
        return ("unclear" if is_unclear else prefix + "never healthy"), 0
    if last >= GOOD * best:
        return prefix + ("spikes" if faults else "healthy"), size
    good = CHECK * int(np.flatnonzero(gains >= GOOD * best)[-1])
    if last > BAD * best or fault.is_harmless or first > good + 2 * CHECK:
        return "unclear", 0
    end = min([good, *(step for step in [first, *faults] if step > good - CHECK)])
    if not math.isfinite(losses[-1]):
        return prefix + "non-finite", end
    return prefix + ("diverged" if end >= LEAST else "never healthy"), end


def describe(
    case: Case, norms: Any, losses: list[float], level: float, scales: Any
) -> dict[str, Any]:
    """Return a run with its label."""
    is_fault = FAULTS[case.fault].is_fault
    faults = np.flatnonzero(scales != 1).tolist() if is_fault else []
    kind, end = label(case, losses, level, faults, len(norms))
    return {
        "name": case.name,
        "label": kind,
        "kept": case.is_kept,
        "end": end,
        "faults": faults,
        "level": level,
        "losses": [float(f"{x:.4g}") if math.isfinite(x) else None for x in losses],
        "norms": norms,
    }


def save(runs: list[dict[str, Any]], path: Path) -> None:
    """Write the labelled runs: norms as rounded float32, the rest as JSON."""
    runs = [run for run in runs if run["label"] != "unclear"]
    keys = "name", "label", "kept", "end", "faults"
    about = [{key: run[key] for key in keys} for run in runs]
    with np.errstate(over="ignore"):
        norms = np.concatenate([run["norms"] for run in runs]).astype(np.float32)
    bits = norms.view(np.uint32)
    bits[np.isfinite(norms)] &= np.uint32(0xFFFFFC00)  # 13 of 23 bits: 0.01 %
    sizes = np.array([len(run["norms"]) for run in runs])
    np.savez_compressed(path, norms=norms, sizes=sizes, about=json.dumps(about))


def main(arguments: list[str] | None = None) -> None:
    """Train all cases and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=FILE)
    parser.add_argument("--quick", action="store_true", help="three runs")
    options = parser.parse_args(arguments)
    cases = list_cases([*TUNING_SEEDS, KEPT_SEED])
    cases = cases[:3] if options.quick else cases
    runs = run_all(train, [(case,) for case in cases], options.workers)
    for run in runs:
        print(f"{run['label']:20} {'kept' if run['kept'] else '':5} {run['name']}")
    save(runs, options.output)


if __name__ == "__main__":
    main()
