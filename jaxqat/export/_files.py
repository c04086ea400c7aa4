"""Writing an artifact: never over another file by accident, and never half."""

import os
from pathlib import Path

from jaxqat.errors import ExportError


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses a path that exists, or whose folder does not, before any work is done.

    Raises:
        ExportError: Names the path, and what would be right.
    """
    try:
        if path.is_dir():
            raise ExportError(f"{path}: is a folder; right would be the name of a file in it.")
        if not path.parent.is_dir():
            raise ExportError(f"{path}: there is no folder {path.parent}.")
        if path.exists() and not overwrite:
            raise ExportError(
                f"{path}: exists already; give another name, or pass overwrite=True (--overwrite)."
            )
    except OSError as error:  # Such as a name that is too long.
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}.") from error


def write_file(path: Path, content: bytes) -> None:
    """Gives `path` its new content in one step; what fails leaves nothing behind.

    Raises:
        ExportError: If it cannot be written; names the path and why.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}.") from error
