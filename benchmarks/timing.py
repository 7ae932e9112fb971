"""Timing in one process: all contenders in every round, compared within the round."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

LEAST_ROUNDS = 5
MOST_ROUNDS = 400

Timed = Callable[[], float]
"""Takes one step and returns its seconds."""
Times = Mapping[str, Sequence[float]]
"""The seconds of every step, by contender and in the order of the rounds."""


class Spread(NamedTuple):
    """The median, and the quartiles around it."""

    low: float
    median: float
    high: float


def clock(
    step: Callable[[], Any],
    prepare: Callable[[], Any] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Return a step that is timed by `now`, after what prepares it, which is not."""

    def timed() -> float:
        if prepare:
            prepare()
        start = now()
        step()
        return now() - start

    return timed


def alternate(contenders: Mapping[str, Timed], seconds: float) -> Times:
    """Return what each contender took: in turns, in a new random order each round."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    end, rounds = time.perf_counter() + seconds, 0
    gc.collect()
    gc.disable()
    try:
        while rounds < LEAST_ROUNDS or (
            rounds < MOST_ROUNDS and time.perf_counter() < end
        ):
            shuffle(order)
            for name in order:
                taken[name].append(contenders[name]())
            rounds += 1
    finally:
        gc.enable()
    return taken


def compare(
    taken: Times, reference: Sequence[float], **labels: str
) -> list[dict[str, Any]]:
    """Return a line of plain numbers per contender.

    Args:
      taken: what `alternate` returned.
      reference: the seconds of what they are compared with, in the same rounds.
      labels: other entries of each line, such as the model.
    """
    return [
        {
            **labels,
            "contender": name,
            "rounds": len(times),
            "milliseconds": spread([1e3 * seconds for seconds in times])._asdict(),
            "fastest_milliseconds": 1e3 * min(times),
            "ratio": spread(
                [mine / other for mine, other in zip(times, reference, strict=True)]
            )._asdict(),
        }
        for name, times in taken.items()
    ]


def spread(values: Sequence[float]) -> Spread:
    """Return quartiles and median of at least two values."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))
