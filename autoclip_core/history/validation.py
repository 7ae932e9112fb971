"""What is broken in a state that was read from somewhere, told in words.

A file of other hands, or a flipped bit: a state that was loaded may hold what no run
leaves behind. Each kind of state has its own rule, a method `fault() -> str` in NumPy
that returns "" where it is sound; here all that lie in one another are asked.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from autoclip_core.checks import message
from autoclip_core.scale import Array


def faults(state: Any, path: str) -> Iterator[str]:
    """Yield what is wrong with a state and with the states inside, by their path.

    Args:
      state: nested named tuples of NumPy arrays; those without a `fault` are sound.
      path: what the state is called.

    >>> from autoclip_core import EmaRatio, Warmup
    >>> state = Warmup(EmaRatio(), steps=9).init(rows=1)
    >>> state.inner.count[:] = -1
    >>> list(faults(state, "state"))
    ['state.inner: count must be >= 0, got -1']
    """
    if not isinstance(state, tuple):
        return
    told = state.fault() if hasattr(state, "fault") else ""
    if told:
        yield f"{path}: {told}"
    pairs = zip(state._fields, state, strict=True)  # type: ignore[attr-defined]
    for name, part in pairs:
        yield from faults(part, f"{path}.{name}")


def broken(name: str, values: Array, rule: str, holds: Array) -> str:
    """Return which of the values breaks the rule, or "" where it holds for all."""
    wrong = np.asarray(values)[~np.asarray(holds)]
    return message(name, rule, wrong[0].item(), "") if wrong.size else ""


def broken_mean(mean: Array, count: Array) -> str:
    """Return what is wrong with an average of `count` norms, all of them positive."""
    fits = np.isfinite(mean) & np.where(count > 0, mean > 0, mean == 0)
    return broken("count", count, ">= 0", count >= 0) or broken(
        "mean", mean, "finite, > 0 of some norms and 0 of none", fits
    )
