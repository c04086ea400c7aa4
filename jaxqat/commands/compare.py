"""`jaxqat compare`: one page that compares several runs."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxqat.errors import InputError
from jaxqat.pipeline.report import write_comparison
from jaxqat.pipeline.terminal import say, tell


def compare(
    runs: Sequence[Path],
    *,
    output: Path,
    figures: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Compare runs on one page: accuracy, bytes, speed, curves, confusions and classes.

    Needs `config.yaml`, `metrics.jsonl` and `results.json` of each run, which must have been tested
    on the same images. Changes are those from the first run.

    Args:
        runs: Run folders, two or more; the others are compared with the first.
        output: The page to write; one file, without scripts.
        figures: Folder where the figures are written, too, as PNG files.
        overwrite: Replace an existing page.
        console: Where the path of the page is printed; None for standard output.

    Returns:
        Path of the page.

    Raises:
        InputError: There are fewer than two runs, or the output exists and `overwrite` is not
            given.
        ReportError: A file is missing or broken, a run is given twice, the runs were tested on
            different data, or the page cannot be written.
    """
    console, output = console or Console(), Path(output)
    if output.exists() and not overwrite:
        raise InputError(f"{output}: already exists; give another name or pass --overwrite.")
    if len(runs) < 2:
        raise InputError(f"a comparison needs two runs or more, got {len(runs)}.")
    tell(f"comparing {len(runs)} runs", console)
    folder = None if figures is None else Path(figures)
    page = write_comparison([Path(run) for run in runs], output, figures=folder)
    say(f"comparison: {page}", console)
    return page
