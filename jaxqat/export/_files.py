"""Check of an export's target, so that no file is overwritten by accident."""

from pathlib import Path

from jaxqat.errors import ExportError


def check_target(path: Path, overwrite: bool) -> None:
    """Check the target of an export before any work is done.

    Raises:
        ExportError: If the path exists already, is a folder, or its folder does not exist; names
            the path and the fix.
    """
    try:
        if path.is_dir():
            raise ExportError(f"{path}: is a folder; give the name of a file in it.")
        if not path.parent.is_dir():
            raise ExportError(f"{path}: the folder {path.parent} does not exist.")
        if path.exists() and not overwrite:
            raise ExportError(
                f"{path}: already exists; give another name or pass overwrite=True (--overwrite)."
            )
    except OSError as error:  # Such as a name that is too long.
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}.") from error
