"""Writing files that a reader, or a crash, never meets half done."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from jaxqat.errors import JaxqatError

Content = bytes | str | Callable[[IO[bytes]], object]


def write_atomically(
    path: Path, content: Content, *, error: type[JaxqatError] | None = None
) -> None:
    """Create or replace a file in one step: a reader sees the old content or the new one.

    The content goes to a temporary file in the same folder, reaches the disk, and then takes the
    name of the target. After a failure the temporary file is removed and the target is unchanged.

    Args:
        path: File to create or replace. Its folder must exist.
        content: Bytes, text (written as UTF-8), or a function that fills the binary file that it
            is called with.
        error: Class to raise in place of an `OSError`, with the path and the reason in its message.

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
    """Create or replace a JSON file in one step.

    Args:
        path: File to create or replace. Its folder must exist.
        value: What `json.dumps` accepts.
        error: As in `write_atomically`.

    Raises:
        OSError: If the file cannot be written and `error` is None.
        TypeError: If the value has no JSON form.
    """
    write_atomically(path, json.dumps(value, indent=1) + "\n", error=error)


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
