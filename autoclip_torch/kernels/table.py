"""Tables of the pieces of memory that one launch of a kernel writes."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**16
"""The number of elements that one program of a kernel scales."""

Piece = tuple[int, int, int]
"""The address of a tensor, the number of its elements, and its row."""


def fills_its_memory(tensor: Tensor) -> bool:
    """Return whether the elements lie in one piece of memory, in any order of axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


@lru_cache(maxsize=16)
def make_table(
    pieces: tuple[Piece, ...], itemsize: int, device: torch.device, stream: int
) -> Tensor:
    """Return on a device the address, length and row of each chunk of the pieces.

    The copy to the device is asynchronous. Gradients that keep their memory need it
    once.

    Args:
      pieces: one for each tensor.
      itemsize: the bytes of an element.
      stream: the stream that copies the table. Another stream would not wait for it.

    Returns:
      int64, of shape (chunks, 3).
    """
    addresses, sizes, rows = np.array(pieces, np.int64).reshape(-1, 3).T
    counts = -(-sizes // CHUNK)
    index = np.repeat(np.arange(len(pieces)), counts)
    first_chunks = np.cumsum(counts) - counts
    starts = (np.arange(len(index)) - first_chunks[index]) * CHUNK
    columns = [
        addresses[index] + itemsize * starts,
        np.minimum(sizes[index] - starts, CHUNK),
        rows[index],
    ]
    table = torch.from_numpy(np.stack(columns, axis=1))
    if device.type != "cpu":  # a copy from pageable memory would wait for the device
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
