"""One run of the benchmark: a task at a rate under an optimizer, with a contender."""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from contenders import CONTENDERS
from tasks import FAULT, FAULT_SHARE, TASKS, make_optimizer

PATIENCE = 20
"""Steps in a row with a loss that is not finite, after which a run has diverged."""


class Run(NamedTuple):
    """What identifies a run."""

    task: str
    optimizer: str
    factor: float
    """Of the good learning rate."""
    contender: str
    seed: int
    steps: int


def train(run: Run) -> dict[str, Any]:
    """Return the run with its rate, test loss, the task's level, and the CPU seconds.

    The loss is None if it is not finite.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    start = time.process_time()
    task = TASKS[run.task]
    problem = task.make(run.seed, run.steps)
    optimizer = make_optimizer(task, run.optimizer, run.factor, problem.model)
    rate = optimizer.param_groups[0]["lr"]
    optimizer = CONTENDERS[run.contender].install(problem.model, optimizer)
    faults = np.random.default_rng(run.seed).random(run.steps) < FAULT_SHARE
    failures = 0
    for step in range(run.steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / task.warmup)
        optimizer.zero_grad()
        loss = problem.loss(step)
        failures = 0 if math.isfinite(loss.item()) else failures + 1
        if failures == PATIENCE:
            break
        (FAULT * loss if task.faulty and faults[step] else loss).backward()
        optimizer.step()
    with torch.no_grad():
        test_loss = float(problem.test())
    diverged = failures == PATIENCE or not math.isfinite(test_loss)
    return run._asdict() | {
        "rate": rate,
        "loss": None if diverged else test_loss,
        "level": problem.level,
        "seconds": round(time.process_time() - start, 2),
    }
