"""`jaxqat report`: write the report of a run again."""

from pathlib import Path

from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.run.folder import RunFolder


def report(workdir: Path) -> Path:
    """Draw the report of a finished run again, from its folder alone.

    Raises:
        RunFolderError: It is no run folder.
        ReportError: A file that the report needs is missing or broken.
    """
    folder = RunFolder(Path(workdir))
    folder.load_config()
    return write_report(folder.path)
