"""Files of a run folder: the error that names them, and writing that is never seen half done."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from jaxqat.errors import RunError


class ReportError(RunError):
    """A run folder that no report can be drawn from; the message names the file."""


def check(ok: bool, path: Path, problem: str) -> None:
    """Refuses the file at `path` with what is wrong in it, unless `ok`."""
    if not ok:
        raise ReportError(f"{path} is broken: {problem}.")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Gives `path` its new content in one step: a reader sees the old file or the new one.

    Args:
        path: File to create or replace; its folder exists.
        write: Called with a binary file to fill.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
