"""The page itself: what is shown of a run, and in which words."""

from pathlib import Path
from typing import Any

import jinja2

from jaxqat.report.read import read_run, write_atomically

REPORT_FILE = "report.html"


def write_report(workdir: Path) -> Path:
    """Draws RUN/report.html and RUN/figures/*.png from what the run left in its folder.

    Returns:
        The page, one file that needs nothing else.

    Raises:
        ReportError: If a file the report needs is missing or broken.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    page = _render({"run": run})
    path = workdir / REPORT_FILE
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def _render(context: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxqat.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(context)
