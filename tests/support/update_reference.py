"""Recorded gradients, and in NumPy what clipping the updates of SGD makes of them.

`run(case)` is independent of the packages: it takes 100 steps of SGD with momentum on
`gradients()` from `weights()`, in float64, and clips each change of the weights. Every
framework takes the same steps, with `LEARNING_RATE`, `MOMENTUM`, and the policy, scope
and norm of the case, and compares by `assert_agrees`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoclip_core import MeanStd, ParamRatio, Quantile
from autoclip_core.clipper.trust import make_bound

STEPS, LEARNING_RATE, MOMENTUM = 100, 0.01, 0.9
SHAPES = {"weight": (4, 3), "bias": (3,), "scale": (2,)}
"""In the order of the parameters. The weight is laid out as inputs, outputs."""


def weights():
    """Return the weights before the first step; the bias starts at 0."""
    rng = np.random.default_rng(7)
    drawn = {k: rng.standard_normal(shape) for k, shape in SHAPES.items()}
    drawn["bias"] *= 0
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def gradients():
    """Return 100 steps of gradients with heavy tails, and one spike."""
    rng = np.random.default_rng(8)
    steps = []
    for step in range(STEPS):
        size = np.exp(rng.standard_normal()) * (30 if step == 40 else 1)
        steps.append(
            {
                name: (size * 0.2 * rng.standard_normal(shape)).astype(np.float32)
                for name, shape in SHAPES.items()
            }
        )
    return steps


def _rms(values):
    return np.sqrt(np.mean(np.square(values)))


def _l2(values):
    return np.sqrt(np.sum(np.square(values)))


def _ratio(ratio, floor):
    return lambda past, weight_norm: ratio * max(weight_norm, floor)


def _quantile(q, length):
    return lambda past, weight_norm: np.quantile(past[-length:], q) if past else np.inf


def _mean_std(deviations, length):
    def threshold(past, weight_norm):
        if len(past) < 2:
            return np.inf
        recent = past[-length:]
        return np.mean(recent) + deviations * np.std(recent, ddof=1)

    return threshold


@dataclass(frozen=True)
class Case:
    """One policy, and the same rule as a formula."""

    policy: Any
    scope: str
    norm: str
    threshold: Callable[[list[float], float], float]
    """A function of the norms of earlier updates and of the norm of the weights."""

    @property
    def rows(self) -> list[list[str]]:
        """The parameters of each row."""
        return [list(SHAPES)] if self.scope == "global" else [[k] for k in SHAPES]


CASES = {
    "trust": Case(make_bound(), "parameter", "rms", _ratio(0.01, 0.2)),
    "ratio, global": Case(
        ParamRatio(0.02, eps=1e-3), "global", "l2", _ratio(0.02, 1e-3)
    ),
    "quantile": Case(
        Quantile(0.5, history_length=20), "parameter", "l2", _quantile(0.5, 20)
    ),
    "deviations": Case(
        MeanStd(0.5, history_length=128), "global", "l2", _mean_std(0.5, 128)
    ),
}


@dataclass
class Step:
    """What follows from one step: one entry per row, and the weights after it."""

    norms: list[float]
    thresholds: list[float]
    scales: list[float]
    weights: dict[str, Any]


def run(case):
    """Return the 100 steps of a case."""
    measure = _rms if case.norm == "rms" else _l2
    current = {name: w.astype(np.float64) for name, w in weights().items()}
    momentum = {name: np.zeros_like(w) for name, w in current.items()}
    past = [[] for _ in case.rows]
    steps = []
    for gradient in gradients():
        momentum = {k: MOMENTUM * m + gradient[k] for k, m in momentum.items()}
        step = Step([], [], [], {})
        for row, names in enumerate(case.rows):
            update = {name: -LEARNING_RATE * momentum[name] for name in names}
            norm = measure(np.concatenate([u.ravel() for u in update.values()]))
            size = measure(np.concatenate([current[name].ravel() for name in names]))
            threshold = case.threshold(past[row], size)
            scale = threshold / norm if norm > threshold else 1.0
            step.norms.append(norm)
            step.thresholds.append(threshold)
            step.scales.append(scale)
            past[row].append(norm)
            for name in names:
                step.weights[name] = current[name] + scale * update[name]
        current = step.weights
        steps.append(step)
    return steps


def assert_agrees(weights, step, tolerance=1e-6):
    """Compare the weights after a step, relative to their norm.

    Args:
      weights: name to array.
      step: the `Step` of the reference.
      tolerance: the largest |w - w'| / |w'| of the model.
    """
    assert list(weights) == list(step.weights)
    expected = np.concatenate([step.weights[name].ravel() for name in SHAPES])
    got = np.concatenate([np.asarray(weights[k], np.float64).ravel() for k in SHAPES])
    assert _l2(got - expected) <= tolerance * _l2(expected)
