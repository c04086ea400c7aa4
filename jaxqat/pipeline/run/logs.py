"""The epochs of a run as CSV tables and TensorBoard logs, beside metrics.jsonl.

metrics.jsonl is the source: when a stage starts or resumes, its logs are written anew from there,
so that epochs which are trained again occur once.
"""

import csv
import importlib
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console

from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.terminal import tell

COLUMNS = (
    *("stage", "epoch", "step", "learning_rate", "gradient_norm", "loss", "accuracy"),
    *("validation_loss", "validation_accuracy", "images_per_s", "seconds", "frozen"),
)
RANGE_COLUMNS = ("stage", "epoch", "step", "layer", "low", "high")
# TensorBoard's name of each number: it draws those before a slash in one group.
SCALARS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "images_per_s": "speed/images_per_s",
}

Record = Mapping[str, Any]


class RunLogs:
    """The CSV tables of a run and the TensorBoard log of a stage; a context manager.

    Without the package tensorboardX, a line says that there is no TensorBoard log.
    """

    def __init__(self, folder: RunFolder, stage: str, console: Console | None = None):
        self._folder, self._stage, self._console = folder, stage, console
        self._writer: Any = None

    def __enter__(self) -> "RunLogs":
        records = self._folder.read_metrics()
        self._write_tables(records)
        for stage in {r["stage"]: None for r in records}:  # That of another run was copied.
            if stage != self._stage and not self._folder.tensorboard(stage).exists():
                self._rewrite(stage, records, close=True)
        self._writer = self._rewrite(self._stage, records, close=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def epoch(self, record: Record) -> None:
        """Add an epoch, which metrics.jsonl holds already."""
        self._write_tables(self._folder.read_metrics())
        if self._writer is not None:
            _add(self._writer, record)

    def _write_tables(self, records: Sequence[Record]) -> None:
        rows = [[record.get(name) for name in COLUMNS] for record in records]
        write_atomically(self._folder.csv, _table(COLUMNS, rows), error=RunFolderError)
        rows = [
            [*(record[name] for name in RANGE_COLUMNS[:3]), layer, low, high]
            for record in records
            for layer, (low, high) in record.get("ranges", {}).items()
        ]
        write_atomically(self._folder.ranges_csv, _table(RANGE_COLUMNS, rows), error=RunFolderError)

    def _rewrite(self, stage: str, records: Sequence[Record], *, close: bool) -> Any:
        """Write a stage's TensorBoard log anew; return its writer, None without the package."""
        try:
            library = importlib.import_module("tensorboardX")
        except ImportError:
            tell("TensorBoard: no log, because tensorboardX is not installed", self._console)
            return None
        path = self._folder.tensorboard(stage)
        try:
            shutil.rmtree(path, ignore_errors=True)
            writer = library.SummaryWriter(str(path))
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror}.") from error
        for record in records:
            if record["stage"] == stage:
                _add(writer, record)
        if close:
            writer.close()
        return writer


def _add(writer: Any, record: Record) -> None:
    for tag, value in _scalars(record):
        writer.add_scalar(tag, value, record["step"])
    writer.flush()


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    for name, tag in SCALARS.items():
        if record.get(name) is not None:
            yield tag, record[name]
    for layer, (low, high) in record.get("ranges", {}).items():
        yield f"ranges/{layer}/low", low
        yield f"ranges/{layer}/high", high


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
