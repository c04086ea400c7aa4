"""The run folder: whose it is, what lies where, and how it is written.

    config.yaml, checkpoints/{fp32,qat}/STEP/, integer/, ptq/, metrics.jsonl, results.json,
    report_data.npz, report.html, figures/, analysis.json, analysis.html, evaluations/

One process trains in a folder at a time, and a folder belongs to one experiment.
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from jaxqat.errors import InputError
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment


class RunFolderError(InputError):
    """A folder that cannot be used as asked; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder, and the small files in it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """What came of it; the run is finished once it holds the stage QAT."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.path / "report.html"

    @property
    def analysis(self) -> Path:
        """What `analyze` found of its layers; the page of it lies beside."""
        return self.path / "analysis.json"

    @property
    def integer(self) -> Path:
        """The integer network of QAT."""
        return self.path / "integer"

    @property
    def ptq(self) -> Path:
        """The integer network of post-training quantization."""
        return self.path / "ptq"

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    @property
    def origin(self) -> Path:
        """Which run the FP32 stage was taken over from, if it was; beside its checkpoints."""
        return self.checkpoints("fp32") / "from_run.json"

    def read_origin(self) -> dict[str, Any] | None:
        """Name and config hash of the run that trained the FP32 stage; None for this one.

        Raises:
            RunFolderError: If they cannot be read.
        """
        return _read_json(self.origin) if self.origin.exists() else None

    def has_checkpoints(self, stage: str = "*") -> bool:
        """Whether a stage has got anywhere; by default, whether any has."""
        return any(step.name.isdigit() for step in self.path.glob(f"checkpoints/{stage}/*"))

    def has_work(self) -> bool:
        """Whether anything would be lost if the folder became another experiment's."""
        return self.results.exists() or self.integer.exists() or self.has_checkpoints()

    def load_config(self) -> Experiment:
        """The experiment of the run.

        Raises:
            RunFolderError: If this is no run folder.
        """
        if not self.config.is_file():
            raise RunFolderError(f"{self.path}: is no run folder: it holds no config.yaml.")
        return configs.load(self.config)

    def read_results(self) -> dict[str, Any]:
        """The content of results.json.

        Raises:
            RunFolderError: If it is missing or broken.
        """
        return _read_json(self.results)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; one that a killed process cut short is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def write_evaluation(self, name: str, result: Mapping[str, Any]) -> Path:
        """Keep what was measured after training, as RUN/evaluations/NAME.json.

        Raises:
            RunFolderError: If it cannot be written.
        """
        path = self.path / "evaluations" / f"{name}.json"
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path.parent}: cannot be made: {error.strerror}.") from error
        write_json(path, result)
        return path

    def truncate_metrics(self, stage: str, last_step: int) -> None:
        """Forget the epochs of a stage that end after a step: they are about to be done again."""
        if self.metrics.exists():
            own = [r for r in self.read_metrics() if r["stage"] == stage]
            self.replace_metrics(stage, [r for r in own if r["step"] <= last_step])

    def replace_metrics(self, stage: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Put these epochs in the place of those of a stage."""
        lines = [*records, *(r for r in self.read_metrics() if r["stage"] != stage)]
        lines.sort(key=lambda record: record["stage"] != "fp32")
        write_atomically(self.metrics, "".join(json.dumps(r) + "\n" for r in lines))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add an epoch."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader or a crash never meets half of it.

    Raises:
        RunFolderError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}.") from error


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def claim(path: Path) -> Iterator[RunFolder]:
    """A folder to train in, made if need be, that no other process trains in meanwhile.

    The lock ends with the process, however it ends. A folder that was made here and is still
    empty at the end, as after bad input, is taken away again.

    Raises:
        RunFolderError: If it cannot be written, another process has it, or it holds parts of a
            run but no config.
    """
    made = _make_folder(path)
    lock_path = path / ".lock"
    with _locked(lock_path) as lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            folder = RunFolder(path)
            _check_content(folder)
            yield folder
        finally:
            lock_path.unlink(missing_ok=True)
            _remove_empty(made)


def _make_folder(path: Path) -> Sequence[Path]:
    """Make a folder; returns those that were missing, the innermost first."""
    missing = [p for p in (path, *path.absolute().parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"workdir {path}: cannot be made: {error.strerror}.") from error
    return missing


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    """An open file that this process alone has locked."""
    while True:
        try:
            lock = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"workdir {path.parent}: cannot be written: {error.strerror}."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise RunFolderError(
                    f"workdir {path.parent}: another process trains in it (process "
                    f"{lock.read().strip() or 'unknown'}). Wait for it, or give another --workdir."
                ) from None
            # The holder before may have unlinked this file between our opening and locking it.
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                yield lock
                return


def _check_content(folder: RunFolder) -> None:
    parts = [p.name for p in (folder.metrics, folder.results, folder.path / "checkpoints")]
    found = [name for name in parts if (folder.path / name).exists()]
    if found and not folder.config.exists():
        raise RunFolderError(
            f"workdir {folder.path}: holds {', '.join(found)} but no config.yaml to tell of which "
            "experiment. Give another --workdir."
        )


def check_config(folder: RunFolder, experiment: Experiment) -> None:
    """Refuse to go on in the folder of another experiment, if it has got anywhere.

    Raises:
        RunFolderError: Shows every setting that differs.
    """
    if not folder.config.exists() or not folder.has_work():
        return
    differences = configs.differences(folder.load_config(), experiment)
    if differences:
        raise RunFolderError(
            f"workdir {folder.path}: belongs to another config. Old -> new:\n  "
            + "\n  ".join(differences)
            + "\nGive another --workdir, or the old settings."
        )
