"""Constants that depend on a count: computed once, in float64, and looked up.

A rank `(n - 1) * q` in float32 is off by up to 194 units in the last place, and JAX has
no float64 by default; a table of what NumPy computes is exact everywhere.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from autoclip_core.scale import Array

Columns = Callable[..., tuple[Array, ...]]
"""From counts n, shape (rows,), and constants to arrays of one entry per count."""


def look_up_constants(
    columns: Columns, most: int, *constants: float, n: Array, xp: Any
) -> Any:
    """Return `columns(n, *constants)` out of tables for n = 0 ... most.

    A namespace whose arrays lie on a device may have a method `get_tables` with the
    arguments of the one here, which holds their copies there: one made in every step
    would synchronise. Any other gets them by `xp.asarray`.
    """
    held = getattr(xp, "get_tables", None)
    found = (get_tables if held is None else held)(columns, most, *constants)
    return [xp.take(xp.asarray(table), n, axis=0) for table in found]


@lru_cache(maxsize=64)
def get_tables(columns: Columns, most: int, *constants: float) -> tuple[Array, ...]:
    """Return `columns(n, *constants)` for n = 0 ... most, the same arrays every time.

    >>> half, = get_tables(lambda n: (n / 2,), 3)
    >>> half.tolist()
    [0.0, 0.5, 1.0, 1.5]
    """
    return columns(np.arange(most + 1), *constants)
