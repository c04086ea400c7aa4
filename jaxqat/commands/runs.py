"""`jaxqat runs`: list the runs in a folder."""

import dataclasses
from pathlib import Path

from rich.console import Console

from jaxqat.analysis._text import percent
from jaxqat.errors import InputError, JaxqatError
from jaxqat.pipeline.integer_networks import is_finished
from jaxqat.pipeline.results import Results
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.terminal import print_table

DASH = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRow:
    """A run in the table.

    Attributes:
        path: Its folder, below the folder of runs.
        state: 'finished', how far it is, or what is wrong with it.
        accuracies: Accuracy on the test split of FP32, QAT and the integer network, 0..1; None
            where there is none.
        size_bytes: Bytes of the integer network; None if there is none.
    """

    path: Path
    state: str
    accuracies: tuple[float | None, ...] = (None, None, None)
    size_bytes: int | None = None


def runs(folder: Path, *, console: Console | None = None) -> tuple[RunRow, ...]:
    """List the runs in a folder: their state, accuracy and size.

    Reads small files only, and writes nothing.

    Args:
        folder: Folder that holds run folders, at any depth.
        console: Where the table is printed; None for standard output.

    Returns:
        A row for each run, in the order of their paths.

    Raises:
        InputError: The folder does not exist, or holds no run.
    """
    folder = Path(folder)
    found = sorted(path.parent for path in folder.rglob("config.yaml"))
    rows = tuple(_row(folder, RunFolder(path)) for path in found)
    if not rows:
        what = "holds no run folder" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder}: {what}; `jaxqat train --workdir` makes run folders.")
    header = ("run", "state", "FP32 (%)", "QAT (%)", "integer (%)", "bytes")
    cells = [
        (str(row.path), row.state, *map(percent, row.accuracies), _count(row.size_bytes))
        for row in rows
    ]
    print_table(str(folder), header, cells, console or Console(), texts=2)
    return rows


def _row(base: Path, run: RunFolder) -> RunRow:
    path = run.path.relative_to(base)
    try:
        results = run.find_results()
        state = _state(run, results)
    except JaxqatError as error:
        return RunRow(path=path, state=f"damaged: {error}")
    if results is None:
        return RunRow(path=path, state=state)
    return RunRow(
        path=path,
        state=state,
        accuracies=_accuracies(results),
        size_bytes=results.size_bytes.integer,
    )


def _accuracies(results: Results) -> tuple[float | None, ...]:
    networks = (results.fp32, results.qat, results.integer)
    return tuple(None if network is None else network.test.accuracy for network in networks)


def _state(run: RunFolder, results: Results | None) -> str:
    """Return 'finished', or the last epoch of the run."""
    if is_finished(run):
        return "finished"
    if results is not None and results.qat is not None:
        return "finished, without integer/"
    experiment, records = run.load_config(), run.read_metrics()
    if not records:
        return "not trained yet"
    stage, epoch = records[-1]["stage"], records[-1]["epoch"]
    return f"{stage}, epoch {epoch} of {getattr(experiment, stage).epochs}"


def _count(size: int | None) -> str:
    return DASH if size is None else f"{size:,}"
