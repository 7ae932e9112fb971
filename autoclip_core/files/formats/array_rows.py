"""Reads the columns of .npy and .npz arrays."""

import zipfile
from collections.abc import Iterator
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

NPY_MAGIC = b"\x93NUMPY"


def is_npz(file: BinaryIO) -> bool:
    """Return whether a file is a zip archive of arrays."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    file.seek(0)
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_array_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the rows of the arrays in a file, by the name or number of the column."""
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
