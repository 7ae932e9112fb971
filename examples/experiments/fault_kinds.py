"""The faults that are put into the runs of `labelled_series.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np


def constant(_: float) -> float:
    """Return the rate's factor at a share of the run."""
    return 1.0


def warm_up(share: float) -> float:
    """Rise over the first tenth, then fall as a cosine."""
    return min(10 * share, 0.5 + 0.5 * math.cos(math.pi * share)) + 1e-3


def rising(share: float) -> float:
    """Rise by a factor of 1000 over the run, as a search for the rate does."""
    return 1e-3 ** (1 - share)


def no_scales(_: Any, steps: int) -> Any:
    """Return a factor of the loss for each step: 1."""
    return np.ones(steps)


def bad_batches(rng: Any, steps: int, factor: float, share: float) -> Any:
    """Multiply the loss of a share of the steps, after the first twentieth."""
    is_bad = rng.random(steps) < share
    is_bad[: steps // 20] = False
    return np.where(is_bad, factor, 1.0)


def one_batch(_: Any, steps: int, factor: float, at: float, count: int = 1) -> Any:
    """Multiply the loss of one step, or of several; `at` >= 1 is a step."""
    scales, start = np.ones(steps), int(at if at >= 1 else at * steps)
    scales[start : start + count] = factor
    return scales


def shift(_: Any, steps: int, factor: float) -> Any:
    """Multiply the loss from a third of the run on, as another loss would."""
    return np.where(np.arange(steps) < steps // 3, 1.0, factor)


def one_batch_per_step(_: float) -> int:
    """Return the batches in a step at a share of the run."""
    return 1


def ramp(share: float) -> int:
    """Double the batches of a step three times."""
    return int(2 ** int(4 * share))


@dataclass(frozen=True)
class Fault:
    """What is wrong with a run, or only unusual."""

    factor: float = 1.0
    """Of the good learning rate."""
    schedule: Callable[[float], float] = constant
    scales: Callable[[Any, int], Any] = no_scales
    is_fault: bool = True
    """Whether steps with a scale other than 1 are faulty."""
    is_harmless: bool = False
    """Whether a bad loss has another cause than this."""
    batches: Callable[[float], int] = one_batch_per_step
    damage_at: float = -1.0
    """The share of the run after which a layer's weights are damaged."""
    clips_at: float | None = None
    """The threshold, as a multiple of the median of the first norms."""
    clip_from: int = 1
    """How many norms are measured before clipping begins."""
    logs_clipped: bool = False
    is_float16: bool = False
    is_measured_only: bool = False
    """Whether the weights never change."""
    skips: bool = False
    """Whether an update with a norm that is not finite is skipped."""

    @property
    def needs_sampling(self) -> bool:
        """Whether a step may draw several batches."""
        return self.batches is not one_batch_per_step


FAULTS: dict[str, Fault] = {
    "none": Fault(is_harmless=True),
    "warm-up and cosine": Fault(schedule=warm_up, is_harmless=True),
    "no update": Fault(is_measured_only=True, is_harmless=True),
    "batch ramp": Fault(batches=ramp, is_harmless=True),
    "loss x10": Fault(scales=partial(shift, factor=10.0), is_fault=False),
    "loss x0.1": Fault(scales=partial(shift, factor=0.1), is_fault=False),
    "bad batches x30": Fault(scales=partial(bad_batches, factor=30.0, share=0.01)),
    "bad batches x300": Fault(scales=partial(bad_batches, factor=300.0, share=0.02)),
    "bad batches, clipped": Fault(
        scales=partial(bad_batches, factor=300.0, share=0.02), clips_at=1, clip_from=20
    ),
    "poisoned at step 5": Fault(scales=partial(one_batch, factor=1e4, at=5)),
    "poisoned in the middle": Fault(scales=partial(one_batch, factor=1e4, at=0.6)),
    "weights damaged": Fault(damage_at=0.5),
    "rate x30": Fault(factor=30.0),
    "rate x100": Fault(factor=100.0),
    "rate x30, warm-up": Fault(factor=30.0, schedule=warm_up),
    "rate rises to x300": Fault(factor=300.0, schedule=rising),
    "rate x100, clipped": Fault(factor=100.0, clips_at=1.0),
    "NaN from the middle": Fault(scales=partial(one_batch, factor=math.nan, at=0.5)),
    "NaN from step 3": Fault(scales=partial(one_batch, factor=math.nan, at=3)),
    "NaN batches, skipped": Fault(
        scales=partial(bad_batches, factor=math.nan, share=0.02),
        skips=True,
        is_harmless=True,
    ),
    "float16": Fault(is_float16=True, is_harmless=True),
    "log of clipped norms": Fault(
        clips_at=0.7, clip_from=20, logs_clipped=True, is_harmless=True
    ),
    "rate x100, log of clipped norms": Fault(
        factor=100.0, clips_at=0.7, clip_from=20, logs_clipped=True
    ),
}
