"""The error that the report raises, and the check that raises it."""

from pathlib import Path

from jaxqat.errors import RunError


class ReportError(RunError):
    """A file that no report can be made from, or a page that cannot be written."""


def check(ok: bool, path: Path, problem: str) -> None:
    """Raise `ReportError` with the file and what is wrong in it, unless `ok`."""
    if not ok:
        raise ReportError(f"{path} is broken: {problem}.")
