"""What a run's numbers say: a summary to print, and advice that names its numbers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ENOUGH = 100
"""Steps below which a clipping rate says nothing."""

REGIMES = (
    ("spike filter", 0.001, 0.02),
    ("stabiliser", 0.05, 0.25),
    ("normaliser", 0.5, 1.0),
)
"""What a clipping rate stands for: name, lowest rate, highest rate."""


@dataclass(frozen=True)
class Summary:
    """What the clipper did in a run; `print` it.

    Rates and means are over the measured steps, those with a finite observed norm, and
    NaN where there is none. A step of several rows counts as the fraction clipped.
    """

    steps: int
    """All recorded steps."""
    measured: int
    """Steps with a finite observed norm."""
    clip_rate: float
    """Mean clipped fraction, in [0, 1]."""
    mean_scale: float
    """Mean of norm after / norm before."""
    mean_norm: float
    """Mean norm before clipping."""
    max_norm: float
    """Largest finite norm before clipping."""
    nonfinite: int
    """Steps in which a norm was NaN or infinite."""
    skipped: int
    """Steps whose whole update was cancelled."""
    threshold: float
    """The latest threshold; +inf where there is none, NaN where nothing is recorded."""
    advice: tuple[str, ...]
    """Sentences, each with the numbers it rests on."""

    def __str__(self) -> str:
        """Return the numbers line by line, then the advice."""
        threshold = "none" if self.threshold == math.inf else number(self.threshold)
        lines = [
            f"total steps       {self.steps} ({self.measured} with a finite norm)",
            f"clipping rate     {percent(self.clip_rate)}",
            f"mean scale        {number(self.mean_scale)}",
            f"mean norm         {number(self.mean_norm)}",
            f"max norm          {number(self.max_norm)}",
            f"threshold now     {threshold}",
            f"non-finite steps  {self.nonfinite}",
            f"skipped steps     {self.skipped}",
            *self.advice,
        ]
        return "\n".join(lines)


def mean(values: Array) -> float:
    """Return the mean in float64; NaN of nothing."""
    with np.errstate(over="ignore"):  # inf is the answer where the sum overflows
        return float(values.mean(dtype=np.float64)) if values.size else math.nan


def percent(rate: float) -> str:
    """Return a rate in [0, 1] as a person writes it."""
    return "unknown" if math.isnan(rate) else f"{100 * rate:.3g} %"


def number(value: float) -> str:
    """Return a number as a person writes it."""
    return "unknown" if math.isnan(value) else f"{value:.4g}"


def advise_on_rate(clipped: Array, armed: Array, mean_scale: float) -> list[str]:
    """Say which regime the run is in and what looks wrong.

    Args:
      clipped: the clipped fraction of each measured step.
      armed: whether that step had a finite threshold.
      mean_scale: mean of norm after / norm before.
    """
    measured, able, rate = clipped.size, int(armed.sum()), mean(clipped)
    if able < ENOUGH:
        return [too_early(measured, able)]
    advice = [f"{regime(rate, measured)}, mean scale {number(mean_scale)}."]
    if rate > 0.5:
        advice += [
            f"Clipping rate {percent(rate)} is above 50 %: under SGD this is a smaller "
            "learning rate by another name, so lower the learning rate instead. Under "
            "Adam and its kin, or where gradients explode, it can be meant."
        ]
    if mean_scale < 0.3:
        advice += [
            f"Red light: mean scale {number(mean_scale)} is below 0.3, most of the "
            "gradient is removed: raise the threshold or lower the learning rate."
        ]
    if able < 0.9 * measured:
        advice += [
            f"{measured - able} of {measured} steps had no threshold; over the other "
            f"{able} the clipping rate is {percent(mean(clipped[armed]))}."
        ]
    return advice


def too_early(measured: int, able: int) -> str:
    """Say why a clipping rate says nothing yet."""
    if measured >= ENOUGH and not able:
        return (
            f"Nothing could be clipped: in all {measured} steps with a finite norm "
            "there was no threshold (warm-up, or no clipping)."
        )
    return (
        f"Too early to judge: {able} steps had a finite norm and a threshold; a "
        f"clipping rate needs at least {ENOUGH}."
    )


def regime(rate: float, steps: int) -> str:
    """Name what a clipping rate stands for, with the numbers it rests on.

    >>> regime(0.1, 5000)
    'Stabiliser (5 to 25 %): clipping rate 10 % over 5000 steps'
    """
    names = [f"{name} ({100 * a:g} to {100 * b:g} %)" for name, a, b in REGIMES]
    within = [n for n, (_, a, b) in zip(names, REGIMES, strict=True) if a <= rate <= b]
    below = sum(rate > b for _, _, b in REGIMES)
    basis = f"clipping rate {percent(rate)} over {steps} steps"
    if within:
        return f"{within[0].capitalize()}: {basis}"
    if below:
        return f"Between {names[below - 1]} and {names[below]}: {basis}"
    if steps < 1000:
        return f"Inert so far: {basis} (fewer than 1000 cannot show a rate of 0.1 %)"
    return f"Inert: {basis}, below 0.1 %: the threshold does next to nothing, lower it"


def advise_on_nonfinite(nonfinite: int, steps: int) -> list[str]:
    """Say what NaN and infinite norms mean, if there were any."""
    if not nonfinite:
        return []
    return [
        f"{nonfinite} of {steps} steps ({percent(nonfinite / steps)}) had a NaN or "
        "infinite norm, which no threshold mends: look at the loss, the data of those "
        "steps and, in float16, the loss scale."
    ]
