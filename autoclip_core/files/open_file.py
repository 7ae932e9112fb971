"""Opens a file: decompresses it, decodes its text, and recognizes binary formats."""

import codecs
import contextlib
import gzip
import io
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

HEAD = 1 << 16
"""Number of bytes that are examined to recognize a format."""

PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))

BINARY_FORMATS = (
    (b"PAR1", "a Parquet file", "write it with pandas: frame.to_csv('norms.csv')"),
    (b"SQLite format 3", "an SQLite database", "export the metric to a CSV"),
    (b"\x89HDF", "an HDF5 file", "save the norms with numpy.save"),
    (b":W&B", "W&B's own run file", "export the run's history to a CSV"),
    (b"BZh", "a bzip2 file", "decompress it first"),
    (b"\xfd7zXZ", "an xz file", "decompress it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "decompress it first"),
    (b"%PDF", "a PDF", "export the numbers behind the picture to a CSV"),
    (b"\x89PNG", "a picture", "export the numbers behind it to a CSV"),
    (PICKLES, "a pickle", "save the norms with numpy.save"),
    (b"PK\x03\x04", "a zip archive", "unpack it first, or export the norms to a CSV"),
)
"""First bytes of formats that are refused, what they are, and the way out."""


@contextlib.contextmanager
def stdin_as_file(path: str) -> Iterator[str]:
    """Return a path that can be opened several times; "-" is a copy of stdin."""
    if path != "-":
        yield path
        return
    if sys.stdin is None:
        raise ValueError("stdin is closed; name a file")
    with tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.flush()
        yield copy.name


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if it is a gzip file; "-" is stdin.

    The file can be read more than once: stdin is copied to a temporary file first.
    """
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(stdin_as_file(path))
        file: Any = stack.enter_context(open(path, "rb"))
        if read_head(file, 2) == b"\x1f\x8b":
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"it looks like a gzip file that is damaged or cut off ({error}); "
                "compress it again"
            ) from None


def read_head(file: BinaryIO, size: int = HEAD) -> bytes:
    """Return the first bytes of a file, and rewind it."""
    file.seek(0)
    head = file.read(size)
    file.seek(0)
    return head


def refuse_binary(head: bytes) -> None:
    """Raise an error that names the format if the bytes are no text."""
    if head.startswith(b"PK") and b"/data.pkl" in head[:200]:
        raise ValueError(
            "it looks like a file of torch.save, which is not read; save the norms "
            "with numpy.save"
        )
    for magic, name, way_out in BINARY_FORMATS:
        if head.startswith(magic):
            raise ValueError(f"it looks like {name}, which is not read; {way_out}")
    if find_encoding(head) == "utf-8" and b"\x00" in head:
        raise ValueError(
            "it looks like a binary file, and not like text, .npy, .npz or an event "
            "file; export the norms to a CSV"
        )


def find_encoding(head: bytes) -> str:
    """Return the encoding of a text from its first bytes.

    >>> find_encoding("norm".encode("utf-16")), find_encoding(b"norm")
    ('utf-16', 'utf-8')
    """
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    even, odd = head[0:1024:2], head[1:1024:2]
    if len(odd) > 1 and not even.count(0) and odd.count(0) > 0.9 * len(odd):
        return "utf-16-le"
    if len(odd) > 1 and not odd.count(0) and even.count(0) > 0.9 * len(even):
        return "utf-16-be"
    return "utf-8"


def open_lines(file: BinaryIO) -> Iterator[str]:
    """Yield the lines of a text from its start; each ends with a line feed.

    The last line may have no end. Bytes that are no text are replaced.
    """
    encoding = find_encoding(read_head(file))
    decode = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder(encoding)("replace"), translate=True
    ).decode
    start: list[str] = []
    while data := file.read(HEAD):
        *lines, end = decode(data).split("\n")
        for line in lines:
            yield "".join((*start, line, "\n"))
            start.clear()
        start.append(end)
    *lines, end = ("".join(start) + decode(b"", final=True)).split("\n")
    yield from (line + "\n" for line in lines)
    if end:
        yield end
