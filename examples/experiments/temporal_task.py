"""The temporal-order task: marked sequences, and where a network starts."""

from typing import Any

import numpy as np
import torch

from replicas import Weights

SYMBOLS, HIDDEN, CLASSES = 6, 50, 4
"""Two marks and four distractors; units; the orders of two marks."""

RADIUS, FAN_IN = 0.95, 15
"""Of the recurrent matrix at the start: spectral radius, inputs per unit."""


def make_batch(rng: Any, length: int, size: int) -> tuple[Any, Any]:
    """Return one-hot sequences, shape (length, size, SYMBOLS), and their classes."""
    symbols = rng.integers(2, SYMBOLS, size=(length, size))
    first = rng.integers(length // 10, length // 5 + 1, size)
    second = rng.integers(length // 2, 6 * length // 10 + 1, size)
    marks = rng.integers(0, 2, size=(2, size))
    symbols[first, np.arange(size)] = marks[0]
    symbols[second, np.arange(size)] = marks[1]
    return np.eye(SYMBOLS, dtype=np.float32)[symbols], 2 * marks[0] + marks[1]


def start_of(seed: int) -> Weights:
    """Return the paper's sparse start, which carries information for many steps."""
    rng = np.random.default_rng([seed, 1])
    recurrent = np.zeros((HIDDEN, HIDDEN))
    for unit in range(HIDDEN):
        chosen = rng.choice(HIDDEN, FAN_IN, replace=False)
        recurrent[chosen, unit] = rng.normal(size=FAN_IN)
    recurrent *= RADIUS / np.abs(np.linalg.eigvals(recurrent)).max()
    inputs = 0.1 * rng.normal(size=(SYMBOLS, HIDDEN))
    outputs = 0.1 * rng.normal(size=(HIDDEN, CLASSES))
    return Weights(inputs, recurrent, np.zeros(HIDDEN), outputs, np.zeros(CLASSES))


def batches(rngs: list[Any], length: int, size: int, copies: int) -> tuple[Any, Any]:
    """Return a batch from each generator, for every learning rate the same."""
    found = [make_batch(rng, length, size) for rng in rngs]
    x = np.stack([x for x, _ in found] * copies, axis=1)
    y = np.stack([y for _, y in found] * copies)
    return torch.from_numpy(x), torch.from_numpy(y)
