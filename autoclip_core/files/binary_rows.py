"""Reads binary files: .npy and .npz arrays, and TensorBoard's event files.

An event file is a sequence of records: the length, a check sum of it, the event, a
check sum. The package tensorboard reads the events.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

NPY_MAGIC = b"\x93NUMPY"

MAX_EVENT = 1 << 30
"""Number of bytes above which a length is taken for damage."""


def is_npz(file: BinaryIO) -> bool:
    """Return whether a file is a zip archive of arrays."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    file.seek(0)
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_array_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the rows of the arrays in a file, by name or by the number of the column.

    Raises:
      ValueError: the file is damaged, or an array does not hold real numbers.
    """
    columns = read_columns(file)
    for place in range(max((len(column) for column in columns.values()), default=0)):
        yield {n: c[place] for n, c in columns.items() if place < len(c)}


def read_columns(file: BinaryIO) -> dict[str, list[Any]]:
    """Return the columns of all arrays in a file.

    A field of a structured array is a column. An array of two dimensions has the
    columns "0", "1", ..., unless one dimension is 1.
    """
    loaded = load_arrays(file)
    if isinstance(loaded, np.ndarray):
        return dict(split_columns("", loaded))
    with loaded:
        arrays = [(name, read_member(loaded, name)) for name in loaded.files]
    return {n: c for name, array in arrays for n, c in split_columns(name, array)}


def load_arrays(file: BinaryIO) -> Any:
    """Return the content of a file; damage raises ValueError."""
    try:
        return np.load(file, allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(
            "it holds Python objects; save the norms alone: "
            "numpy.save('norms.npy', numpy.asarray(norms, float))"
        ) from None
    except (SyntaxError, MemoryError, TokenError, zipfile.BadZipFile) as error:
        raise ValueError(f"the header of the array is damaged: {error}") from None


def read_member(archive: Any, name: str) -> Any:
    """Return one array of an archive; damage raises ValueError."""
    try:
        return archive[name]
    except (SyntaxError, MemoryError, TokenError, zipfile.BadZipFile) as error:
        raise ValueError(f"the array {name!r} is damaged: {error}") from None


def split_columns(name: str, array: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and the numbers of each column of an array."""
    if array.dtype.names:
        for field in array.dtype.names:
            yield (f"{name}.{field}" if name else field), array[field].tolist()
        return
    if array.dtype.kind not in "fiu":
        if name:  # an archive may hold other arrays too
            return
        raise ValueError(
            f"the array must hold real numbers, got {array.dtype}; bfloat16 and others "
            "that NumPy does not know: save norms.astype('float32')"
        )
    if array.ndim == 2 and 1 in array.shape:
        array = array.ravel()
    if array.ndim == 1:
        yield name or "norm", array.tolist()
    elif array.ndim == 2:
        for place in range(array.shape[1]):
            yield f"{name}.{place}" if name else str(place), array[:, place].tolist()
    elif not name:
        raise ValueError(
            f"the array must have one dimension, got shape {array.shape}; save the "
            "norms alone: numpy.save('norms.npy', norms)"
        )


def is_event_file(head: bytes) -> bool:
    """Return whether a file begins with the first event, which holds its version."""
    return b"brain.Event:" in head[12:64]


def read_event_rows(
    open_files: Callable[[], Iterable[BinaryIO]],
) -> Iterator[dict[str, Any]]:
    """Yield the step and the number of each scalar in the event files of one run.

    A later file is of a resumed run: its steps replace those of the files before it.

    Args:
      open_files: returns the files in the order of time; it is called twice.

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
