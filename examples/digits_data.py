"""scikit-learn's bundled handwritten digits, read as sequences: nothing to download."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

Array = npt.NDArray[Any]

LENGTH = 16
"""Steps per image: the 8 x 8 pixels row by row, four at a time."""

INPUTS = 64 // LENGTH
CLASSES = 10
TRAINING_IMAGES = 1400


class Digits(NamedTuple):
    """Sequences of shape (images, LENGTH, INPUTS) in [0, 1], and the digits 0 to 9."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


@cache
def load() -> Digits:
    """Return 1400 images to train on and 397 to test with, the same ones every time."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x = (bunch.images[order] / 16).astype(np.float32).reshape(-1, LENGTH, INPUTS)
    y = bunch.target[order].astype(np.int64)
    cut = TRAINING_IMAGES
    return Digits(x[:cut], y[:cut], x[cut:], y[cut:])


def batches(seed: int, steps: int, size: int) -> Iterator[Array]:
    """Yield the training images of each step, in a new random order every epoch."""
    rng = np.random.default_rng(seed)
    per_epoch = TRAINING_IMAGES // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(TRAINING_IMAGES)
        start = step % per_epoch * size
        yield order[start : start + size]
