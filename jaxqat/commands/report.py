"""`jaxqat report`: write the report of a run again."""

from pathlib import Path

from rich.console import Console

from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.terminal import say, tell


def report(run: Path, *, console: Console | None = None) -> Path:
    """Write RUN/report.html again from the files in the run folder.

    Args:
        run: Run folder.
        console: Where the path of the report is printed; None for standard output.

    Returns:
        Path of the report.

    Raises:
        RunFolderError: If the folder is not a run folder.
        ReportError: If a file that the report needs is missing or broken.
    """
    console = console or Console()
    folder = RunFolder(Path(run))
    folder.load_config()
    tell("drawing the report", console)
    page = write_report(folder.path)
    say(f"report: {page}", console)
    return page
