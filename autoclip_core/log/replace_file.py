"""Write a file next to the old one, and rename it when it is whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def open_replacement(
    path: str | os.PathLike[str], mode: str = "w", **options: Any
) -> Iterator[IO[Any]]:
    """Open a file for writing that replaces `path` at the end.

    If an error is raised before the end, the old file is unchanged. A device or a pipe,
    such as /dev/stdout, is written directly.

    Args:
      path: the file; a link is followed.
      mode: "w" or "wb".
      options: arguments of `open`.

    Raises:
      OSError: the file cannot be written; the error names `path`.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        with open(path, mode, **options) as file:
            yield file
        return
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        file = open(temporary, mode, **options)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
    try:
        with file:
            yield file
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
