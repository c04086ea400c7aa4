"""The run folder: its files and the lock on them.

    config.yaml, compilation.json, checkpoints/{fp32,qat}/STEP/, integer/, ptq/RECIPE/,
    metrics.jsonl, metrics.csv, ranges.csv, tensorboard/{fp32,qat}/, results.json,
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

from jaxqat.errors import InputError, RunError
from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline import config as configs
from jaxqat.pipeline import results
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.measurements import Comparison, Evaluation, RunAnalysis
from jaxqat.pipeline.reading import parse_metrics
from jaxqat.pipeline.results import Results
from jaxqat.pipeline.training import COMPILATIONS


class RunFolderError(InputError):
    """An unusable run folder; the message names it and the reason."""


class DamagedFileError(RunFolderError, RunError):
    """A file that jaxqat wrote into a run folder is damaged; the exit status is 1."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder, and its small files."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def compilation(self) -> Path:
        """How training steps are compiled on a CPU, and the times that decided it."""
        return self.path / "compilation.json"

    def read_compilation(self) -> str | None:
        """Return the name of the compilation that was chosen; None if there is none.

        Raises:
            RunFolderError: If it cannot be read.
        """
        if not self.compilation.exists():
            return None
        name = _read_json(self.compilation).get("compilation")
        if name not in COMPILATIONS:
            raise RunFolderError(
                f"{self.compilation}: compilation must be one of {', '.join(COMPILATIONS)}, got "
                f"{name!r}."
            )
        return name

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON line per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def csv(self) -> Path:
        """The same, without ranges, as a table."""
        return self.path / "metrics.csv"

    @property
    def ranges_csv(self) -> Path:
        """The range of each layer's input after each epoch, as a table."""
        return self.path / "ranges.csv"

    def tensorboard(self, stage: str) -> Path:
        """Return the folder of a stage's TensorBoard log."""
        return self.path / "tensorboard" / stage

    @property
    def results(self) -> Path:
        """Scores and other measurements, written at the end of `train` and `quantize`."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def analysis(self) -> Path:
        """The result of `analyze`."""
        return self.path / "analysis.json"

    @property
    def integer(self) -> Path:
        """The integer network of QAT."""
        return self.path / "integer"

    @property
    def ptq(self) -> Path:
        """The integer networks of post-training quantization (PTQ), a folder for each recipe."""
        return self.path / "ptq"

    def ptq_names(self) -> list[str]:
        """Return the names of the recipes with an integer network of PTQ."""
        return sorted(p.name for p in self.ptq.glob("[!.]*") if p.is_dir())

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    @property
    def origin(self) -> Path:
        """Origin of the FP32 stage if another run trained it; next to its checkpoints."""
        return self.checkpoints("fp32") / "from_run.json"

    def read_origin(self) -> dict[str, Any] | None:
        """Return name and config hash of the run that trained the FP32 stage; None for this run.

        Raises:
            RunFolderError: If they cannot be read.
        """
        return _read_json(self.origin) if self.origin.exists() else None

    def has_checkpoints(self, stage: str = "*") -> bool:
        """Return whether a stage, by default any stage, has a checkpoint."""
        return any(path.name.isdigit() for path in self.path.glob(f"checkpoints/{stage}/*"))

    def check_checkpoints(self, stage: str) -> None:
        """Raise `RunFolderError` if a stage has no checkpoint."""
        if not self.has_checkpoints(stage):
            raise RunFolderError(
                f"{self.checkpoints(stage)}: there are no checkpoints of {stage}; `jaxqat train` "
                "makes them."
            )

    def has_work(self) -> bool:
        """Return whether the folder holds results, a network or checkpoints."""
        return self.results.exists() or self.integer.exists() or self.has_checkpoints()

    def load_config(self) -> Experiment:
        """Read the experiment of the run.

        Raises:
            RunFolderError: If this is not a run folder.
        """
        if not self.config.is_file():
            why = "is not a run folder: it holds no config.yaml"
            if not self.path.exists():
                why = "there is no such folder"
            raise RunFolderError(f"{self.path}: {why}.")
        return configs.load(self.config)

    def read_results(self) -> Results:
        """Read results.json.

        Raises:
            RunFolderError: If it is missing or broken; names the key.
        """
        error = DamagedFileError if self.results.exists() else RunFolderError
        return results.read(self.results, Results, error=error)

    def find_results(self) -> Results | None:
        """Read results.json; None if there is none yet.

        Raises:
            RunFolderError: If it is broken; names the key.
        """
        return self.read_results() if self.results.exists() else None

    def write_results(self, content: Results) -> None:
        """Replace results.json atomically.

        Raises:
            RunFolderError: If it cannot be written.
        """
        results.write(self.results, content, error=RunFolderError)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl up to the first incomplete line, left by a killed process."""
        if not self.metrics.exists():
            return []
        text = self.metrics.read_text(encoding="utf-8")
        return [record for _, record in parse_metrics(text, self.metrics)]

    def write_evaluation(self, name: str, result: Evaluation | Comparison) -> Path | None:
        """Write a measurement to RUN/evaluations/NAME.json.

        Returns:
            The file; None if the run folder is read-only, and nothing was written.

        Raises:
            RunFolderError: If it cannot be written.
        """
        path = self.path / "evaluations" / f"{name}.json"
        if not _writable(path.parent if path.parent.exists() else self.path):
            return None
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path.parent}: cannot be made: {error.strerror}.") from error
        results.write(path, result, error=RunFolderError)
        return path

    def write_analysis(self, result: RunAnalysis) -> None:
        """Replace analysis.json in one step.

        Raises:
            RunFolderError: If it cannot be written.
        """
        results.write(self.analysis, result, error=RunFolderError)

    def truncate_metrics(self, stage: str, last_step: int) -> None:
        """Remove a stage's epochs that end after `last_step`; they will be trained again."""
        if self.metrics.exists():
            own = [r for r in self.read_metrics() if r["stage"] == stage]
            self.replace_metrics(stage, [r for r in own if r["step"] <= last_step])

    def replace_metrics(self, stage: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace the epochs of a stage."""
        lines = [*records, *(r for r in self.read_metrics() if r["stage"] != stage)]
        lines.sort(key=lambda record: record["stage"] != "fp32")
        text = "".join(json.dumps(r) + "\n" for r in lines)
        write_atomically(self.metrics, text, error=RunFolderError)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append an epoch."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _writable(folder: Path) -> bool:
    """Return whether this process may write into a folder, by its effective user."""
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK, effective_ids=effective)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path}: cannot be read: {error}") from error


@contextmanager
def claim(path: Path) -> Iterator[RunFolder]:
    """Lock a run folder for this process; create it if it is missing.

    The lock also ends if the process is killed. A folder that was created here and is still empty
    at the end, for example after bad input, is removed.

    Raises:
        RunFolderError: If it cannot be written, another process has locked it, or it holds parts
            of a run but no config.
    """
    created = _make_folder(path)
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
            _remove_empty(created)


def _make_folder(path: Path) -> Sequence[Path]:
    """Create a folder; return the folders that were missing, the innermost first."""
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
    """Open a file and lock it for this process."""
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
            # The previous owner may have unlinked the file between our opening and locking it.
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                yield lock
                return


def _check_content(folder: RunFolder) -> None:
    parts = [p.name for p in (folder.metrics, folder.results, folder.path / "checkpoints")]
    found = [name for name in parts if (folder.path / name).exists()]
    if found and not folder.config.exists():
        raise RunFolderError(
            f"workdir {folder.path}: holds {', '.join(found)} but no config.yaml, so its "
            "experiment is unknown. Give another --workdir."
        )


def check_config(folder: RunFolder, experiment: Experiment) -> None:
    """Check that a folder with results or checkpoints belongs to this experiment.

    Raises:
        RunFolderError: If not; lists every setting that differs.
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
