"""Turn l2 norms into rms norms, with the number of elements of each row."""

import math
from typing import Any

import numpy as np
import torch

from autoclip_core.clipper.norms import to_rms
from autoclip_torch.rows.rows import Rows


def divide_by_roots(rows: Rows, norms: Any, sizes: Any) -> Any:
    """Return l2 norms as rms norms.

    Args:
      rows: the rows.
      norms: an array or a tensor of shape (rows,).
      sizes: the number of elements of each row, of the same kind as `norms`; or a dict
        from `Rows.count_elements`.
    """
    is_numpy = isinstance(norms, np.ndarray)
    if not isinstance(sizes, dict):
        return to_rms(norms, sizes, np if is_numpy else torch)
    if is_numpy:
        return to_rms(norms, rows.repeat(sizes))
    # The divisors go to a device as arguments of a kernel. A copy would synchronize.
    divisors = [math.sqrt(max(size, 1)) for size in sizes.values()]
    parts = torch.split(norms, [*rows.ranges.values()])
    return torch.cat(torch._foreach_div(parts, divisors))
