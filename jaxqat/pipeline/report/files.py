"""The error of the report, and a check that raises it."""

from pathlib import Path

from jaxqat.errors import RunError


class ReportError(RunError):
    """A file is missing or broken, or a page cannot be written."""


def check(ok: bool, path: Path, problem: str) -> None:
    """Raise `ReportError` with the file and its problem, unless `ok`."""
    if not ok:
        raise ReportError(f"{path} is broken: {problem}.")
