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
    def rows(self) -> list[list[tuple[str, Any]]]:
        """The parts of each row: a parameter, and the index of its elements."""
        whole = [(name, ...) for name in SHAPES]
        if self.scope == "global":
            return [whole]
        if self.scope == "unit":  # a unit is a column of the weight, or a whole vector
            whole[:1] = [("weight", np.s_[:, unit]) for unit in range(3)]
        return [[part] for part in whole]


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
    "units": Case(ParamRatio(0.02, eps=0.2), "unit", "l2", _ratio(0.02, 0.2)),
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
        step = Step([], [], [], {k: np.empty_like(w) for k, w in current.items()})
        for row, parts in enumerate(case.rows):
            updates = [-LEARNING_RATE * momentum[name][index] for name, index in parts]
            old = [current[name][index] for name, index in parts]
            norm, size = (
                measure(np.concatenate([*map(np.ravel, arrays)]))
                for arrays in (updates, old)
            )
            threshold = case.threshold(past[row], size)
            scale = threshold / norm if norm > threshold else 1.0
            step.norms.append(norm)
            step.thresholds.append(threshold)
            step.scales.append(scale)
            past[row].append(norm)
            for (name, index), weight, update in zip(parts, old, updates, strict=True):
                step.weights[name][index] = weight + scale * update
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
