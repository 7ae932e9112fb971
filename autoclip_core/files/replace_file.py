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

    If an error is raised before the end, the old file is unchanged. A link is followed.
    A device or a pipe, such as /dev/stdout, is written directly.
    """
    target = os.path.realpath(path)
    is_device = os.path.exists(target) and not os.path.isfile(target)
    written = target if is_device else f"{target}.{os.getpid()}.tmp"
    try:
        with open(written, mode, **options) as file:
            yield file
        if not is_device:
            if os.path.exists(target):
                shutil.copymode(target, written)
            os.replace(written, target)
    except BaseException as error:
        if not is_device:
            Path(written).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, written):
            if error.errno is not None:  # a full disk is reported without a name
                name = os.fspath(path)
                raise type(error)(error.errno, error.strerror, name) from None
        raise
