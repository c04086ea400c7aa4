"""The check of an export's target: never over another file by accident."""

from pathlib import Path

from jaxqat.errors import ExportError


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a path that exists, or whose folder does not, before any work is done.

    Raises:
        ExportError: Names the path, and what would be right.
    """
    try:
        if path.is_dir():
            raise ExportError(f"{path}: is a folder; give the name of a file in it.")
        if not path.parent.is_dir():
            raise ExportError(f"{path}: there is no folder {path.parent}.")
        if path.exists() and not overwrite:
            raise ExportError(
                f"{path}: exists already; give another name, or pass overwrite=True (--overwrite)."
            )
    except OSError as error:  # Such as a name that is too long.
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}.") from error
