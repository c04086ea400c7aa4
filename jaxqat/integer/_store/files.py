"""Atomic file writes, which leave no half-written file, and bounded reads of regular files."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from jaxqat.errors import JaxqatError

Content = bytes | str | Callable[[IO[bytes]], object]


def write_atomically(
    path: Path, content: Content, *, error: type[JaxqatError] | None = None
) -> None:
    """Create or replace a file atomically: readers see either the old or the new content.

    The content is written to a temporary file in the same folder, synced to disk, and renamed to
    the target. After a failure the temporary file is removed and the target is unchanged.

    Args:
        path: File to create or replace. Its folder must exist.
        content: Bytes, text (written as UTF-8), or a function that writes to an open binary file.
        error: Class to raise instead of `OSError`; its message has the path and the reason.

    Raises:
        OSError: If the file cannot be written and `error` is None.
    """
    try:
        _write(path, content)
    except OSError as problem:
        if error is None:
            raise
        reason = problem.strerror or problem
        raise error(f"{path}: cannot be written: {reason}.") from problem


def write_json(path: Path, value: Any, *, error: type[JaxqatError] | None = None) -> None:
    """Create or replace a JSON file atomically.

    Args:
        path: File to create or replace. Its folder must exist.
        value: Any value that `json.dumps` accepts.
        error: As in `write_atomically`.

    Raises:
        OSError: If the file cannot be written and `error` is None.
        TypeError: If the value has no JSON form.
    """
    write_atomically(path, json.dumps(value, indent=1) + "\n", error=error)


def read_regular(path: Path, *, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    A pipe would block and a device may never end, so neither is read.

    Raises:
        OSError: If the file is missing, no regular file or larger; `strerror` has the reason.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with open(descriptor, "rb") as file:
        content = file.read(limit + 1) if status.st_size <= limit else b""
    if status.st_size > limit or len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
    return content


def _write(path: Path, content: Content) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            elif isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
