"""Validate a loaded policy state and describe what is invalid.

A foreign file or a flipped bit can give a state that no run produces. Each kind of
state has its own rule: a method `find_problem() -> str` in NumPy, which returns "" if
the state is valid. `find_problems` applies these rules to a state and to all states
inside it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from autoclip_core.checks import format_error
from autoclip_core.scale import Array


def find_problems(state: Any, path: str, *, is_signed: bool = False) -> Iterator[str]:
    """Yield one message per invalid state: the given state and all states inside it.

    Args:
      state: nested named tuples of NumPy arrays. A tuple without a method
        `find_problem` is valid.
      path: the name of the state in the messages.
      is_signed: whether the recorded values may be 0 or negative, as losses may. A
        state that has another rule then has a method `find_signed_problem`.

    >>> from autoclip_core import EmaRatio, Warmup
    >>> state = Warmup(EmaRatio(), steps=9).init(rows=1)
    >>> state.inner.count[:] = -1
    >>> list(find_problems(state, "state"))
    ['state.inner: count must be >= 0, got -1']
    """
    if not isinstance(state, tuple):
        return
    find_problem = getattr(state, "find_problem", str)
    if is_signed:
        find_problem = getattr(state, "find_signed_problem", find_problem)
    problem = find_problem()
    if problem:
        yield f"{path}: {problem}"
    pairs = zip(state._fields, state, strict=True)  # type: ignore[attr-defined]
    for name, part in pairs:
        yield from find_problems(part, f"{path}.{name}", is_signed=is_signed)


def find_invalid_value(name: str, values: Array, rule: str, is_valid: Array) -> str:
    """Return an error text for the first invalid value, or "" if all are valid."""
    invalid = np.asarray(values)[~np.asarray(is_valid)]
    return format_error(name, rule, invalid[0].item(), "") if invalid.size else ""


def find_invalid_mean(mean: Array, count: Array, lowest: float = 0.0) -> str:
    """Return an error text for an invalid mean of `count` values, or "".

    Each value is above `lowest`: 0 for norms, -inf for losses.
    """
    is_valid = np.isfinite(mean) & np.where(count > 0, mean > lowest, mean == 0)
    rule = "finite, > 0 after at least one norm and 0 before the first"
    if lowest < 0:
        rule = "finite, and 0 before the first loss"
    return find_invalid_value("count", count, ">= 0", count >= 0) or find_invalid_value(
        "mean", mean, rule, is_valid
    )
