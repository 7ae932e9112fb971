"""The benchmark's tasks: how long each trains, and which learning rates are good.

A good rate has the least test loss of a sweep in steps of the root of 10, with seed 100
and without clipping or faults. No rate survives the heavy tails without clipping: they
have the good rate of the best constant at scale 1, in proportion to the scale under
AdamW.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from digit_problems import (
    VisionTransformer,
    autoencoder,
    classify,
    conv_net,
    fine_tuning,
    mlp,
    residual,
)
from problems import (
    Problem,
    bytes_of_text,
    control,
    heavy_tails,
    speech_loss,
    temporal_order,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGD, momentum 0.9": partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}

FACTORS = (0.1, 1.0, 10.0, 30.0, 100.0)
"""What the good rate is multiplied by."""

FAULT, FAULT_SHARE = 300.0, 0.02
"""What a fault multiplies a gradient by, and how many steps have one."""


@dataclass(frozen=True)
class Task:
    """A problem with its number of steps and the good rate under each optimizer."""

    make: Callable[..., Problem]
    """Of seed and steps."""
    steps: int
    rates: tuple[float, float, float]
    """In the order of `OPTIMIZERS`."""
    warmup: int = 1
    """The steps over which the rate rises from 0 to its value."""
    faulty: bool = False


TUNING: dict[str, Task] = {
    "byte model": Task(bytes_of_text, 150, (0.3, 0.3, 0.01), warmup=20),
    "byte model, faults": Task(
        bytes_of_text, 150, (0.3, 0.3, 0.01), warmup=20, faulty=True
    ),
    "residual net": Task(residual, 150, (0.1, 0.03, 0.003)),
    "heavy tails × 0.001": Task(
        partial(heavy_tails, scale=1e-3), 2000, (0.003, 0.0003, 1e-5)
    ),
    "heavy tails × 1": Task(
        partial(heavy_tails, scale=1.0), 2000, (0.003, 0.0003, 0.01)
    ),
    "heavy tails × 1000": Task(
        partial(heavy_tails, scale=1e3), 2000, (0.003, 0.0003, 10.0)
    ),
    "conv net": Task(partial(classify, make_model=conv_net), 300, (1.0, 0.3, 0.03)),
    "vision transformer": Task(
        partial(classify, make_model=VisionTransformer, batch=32),
        300,
        (0.3, 0.03, 0.003),
    ),
}
"""The tasks on which settings were chosen, and the prototype before them."""

HELD_OUT: dict[str, Task] = {
    "temporal order": Task(temporal_order, 500, (0.03, 0.003, 0.01)),
    "speech, deep clustering": Task(
        partial(speech_loss, name="DC"), 150, (10.0, 30.0, 0.03)
    ),
    "speech, masks": Task(partial(speech_loss, name="MI"), 150, (3e4, 1e3, 0.03)),
    "MLP, faults": Task(
        partial(classify, make_model=mlp), 300, (1.0, 0.3, 0.01), faulty=True
    ),
    "fine-tuning": Task(fine_tuning, 400, (0.1, 0.03, 0.01)),
    "autoencoder": Task(autoencoder, 400, (1.0, 1.0, 0.01)),
    "control": Task(control, 150, (0.03, 0.003, 0.03)),
}
"""The tasks whose results are reported and chose nothing."""

TASKS: dict[str, Task] = TUNING | HELD_OUT


def make_optimizer(task: Task, name: str, factor: float, model: Any) -> Any:
    """Return the optimizer with `factor` times the task's good rate."""
    rate = task.rates[list(OPTIMIZERS).index(name)]
    return OPTIMIZERS[name](model.parameters(), lr=factor * rate)
