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


def find_problems(state: Any, path: str) -> Iterator[str]:
    """Yield one message per invalid state: the given state and all states inside it.

    Args:
      state: nested named tuples of NumPy arrays. A tuple without a method
        `find_problem` is valid.
      path: the name of the state in the messages.

    >>> from autoclip_core import EmaRatio, Warmup
    >>> state = Warmup(EmaRatio(), steps=9).init(rows=1)
    >>> state.inner.count[:] = -1
    >>> list(find_problems(state, "state"))
    ['state.inner: count must be >= 0, got -1']
    """
    if not isinstance(state, tuple):
        return
    problem = state.find_problem() if hasattr(state, "find_problem") else ""
    if problem:
        yield f"{path}: {problem}"
    pairs = zip(state._fields, state, strict=True)  # type: ignore[attr-defined]
    for name, part in pairs:
        yield from find_problems(part, f"{path}.{name}")


def find_invalid_value(name: str, values: Array, rule: str, is_valid: Array) -> str:
    """Return an error text for the first invalid value, or "" if all are valid."""
    invalid = np.asarray(values)[~np.asarray(is_valid)]
    return format_error(name, rule, invalid[0].item(), "") if invalid.size else ""


def find_invalid_mean(mean: Array, count: Array) -> str:
    """Return an error text for an invalid mean of `count` positive norms, or ""."""
    is_valid = np.isfinite(mean) & np.where(count > 0, mean > 0, mean == 0)
    rule = "finite, > 0 after at least one norm and 0 before the first"
    return find_invalid_value("count", count, ">= 0", count >= 0) or find_invalid_value(
        "mean", mean, rule, is_valid
    )
