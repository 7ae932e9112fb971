"""Reads the scalars in TensorBoard's event files.

An event file is a sequence of records: the length, a check sum of it, the event, a
check sum. The package tensorboard reads the events.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO

MAX_EVENT = 1 << 30
"""Number of bytes above which a length is taken for damage."""


def is_event_file(head: bytes) -> bool:
    """Return whether a file begins with the first event, which holds its version."""
    return b"brain.Event:" in head[12:64]


def read_event_rows(
    open_files: Callable[[], Iterable[BinaryIO]],
) -> Iterator[dict[str, Any]]:
    """Yield the step and the number of each scalar in the event files of one run.

    A later file is of a resumed run: its steps replace those of the files before it.

    Raises:
      ImportError: tensorboard is not installed.
      ValueError: a file is damaged.
    """
    starts = [find_starts(file) for file in islice(open_files(), 1, None)]
    for place, file in enumerate(open_files()):
        later = starts[place:]
        for step, tag, number in read_scalars(file):
            if tag and all(step < start.get(tag, start[""]) for start in later):
                yield {"step": step, tag: number}


def find_starts(file: BinaryIO) -> dict[str, float]:
    """Return the step from which a file replaces earlier ones, by tag.

    It is the first step of the tag. The key "" has the `purge_step` of a writer, which
    applies to every tag, or else infinity.
    """
    starts = {"": math.inf}
    for step, tag, _ in read_scalars(file):
        starts[tag] = min(step, starts.get(tag, starts[""]))
    return starts


def read_scalars(file: BinaryIO) -> Iterator[tuple[int, str, float]]:
    """Yield step, tag and number of each scalar; a start has the tag "" and NaN."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise ImportError(
            "TensorBoard's event files need tensorboard; install it with: "
            'pip install "autoclip-toolkit[files]"'
        ) from error
    for record in read_records(file):
        event = Event.FromString(record)
        if event.session_log.status == SessionLog.START:
            yield event.step, "", math.nan
        for value in event.summary.value:
            number = find_scalar(value, make_ndarray)
            if number is not None:
                yield event.step, value.tag, number


def find_scalar(value: Any, make_ndarray: Any) -> float | None:
    """Return the number of a summary value, or None if it is no scalar."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor"):
        tensor = make_ndarray(value.tensor)
        if tensor.dtype.kind in "fiu" and tensor.size == 1:
            return float(tensor.item())
    return None


def read_records(file: BinaryIO) -> Iterator[bytes]:
    """Yield the records of a file; a last record that is cut off is left out."""
    while True:
        header = file.read(12)
        if len(header) < 12:
            return
        (size,) = struct.unpack("<Q", header[:8])
        if size > MAX_EVENT:
            raise ValueError(f"the event file is damaged before byte {file.tell()}")
        record = file.read(size)
        if len(record) < size or len(file.read(4)) < 4:
            return
        yield record
