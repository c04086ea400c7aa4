"""Read and check the files of a run folder for the report.

`results.json`, `metrics.jsonl` and `config.yaml` are required, the sample images in
`report_data.npz` are optional.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from jaxqat.integer._store.files import read_regular
from jaxqat.integer._store.typed_json import CodecError, TypedJson
from jaxqat.pipeline import results
from jaxqat.pipeline.bounded_json import BOUNDS, Amount, Count, Share
from jaxqat.pipeline.reading import parse_metrics, parse_settings
from jaxqat.pipeline.report.files import ReportError, check
from jaxqat.pipeline.report.samples import Samples, read_samples
from jaxqat.pipeline.results import TRAINED_STAGES, Results

MAX_BYTES = 2**26  # Of config.yaml and metrics.jsonl.
_JSON = TypedJson(encodings=BOUNDS)
_NUMBERS: dict[str, Any] = {
    "epoch": Count,
    "loss": Amount,
    "accuracy": Share,
    "validation_loss": Optional[Amount],  # noqa: UP045 - pyright refuses `|` on a value.
    "validation_accuracy": Optional[Share],  # noqa: UP045
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run folder.

    Attributes:
        config: Settings of the run.
        config_text: Text of config.yaml.
        results: Content of results.json.
        epochs: Lines of metrics.jsonl by stage, in the order of epochs.
        samples: Test images to show; None if the run saved none.
    """

    config: dict[str, Any]
    config_text: str
    results: Results
    epochs: dict[str, list[dict[str, Any]]]
    samples: Samples | None


def read_run(workdir: Path) -> Run:
    """Read and check the files of a run folder that the report needs.

    Raises:
        ReportError: If a file is missing or broken.
    """
    config_text = _read_text(workdir / "config.yaml")
    return Run(
        config=parse_settings(config_text, workdir / "config.yaml", error=ReportError),
        config_text=config_text,
        results=results.read(workdir / "results.json", Results, error=ReportError),
        epochs=_read_epochs(workdir / "metrics.jsonl"),
        samples=read_samples(workdir),
    )


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, limit=MAX_BYTES).decode()
    except FileNotFoundError as error:
        raise ReportError(
            f"{path} is missing: a report needs the folder of an evaluated run."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}.") from error


def _read_epochs(path: Path) -> dict[str, list[dict[str, Any]]]:
    by_stage: dict[str, dict[int, dict[str, Any]]] = {}
    for number, record in parse_metrics(_read_text(path), path, error=ReportError):
        _check_record(record, path, number)
        # A resumed run may have repeated an epoch; its last line counts.
        by_stage.setdefault(record["stage"], {})[record["epoch"]] = record
    check(bool(by_stage), path, "holds no epoch")
    return {
        stage: [records[epoch] for epoch in sorted(records)] for stage, records in by_stage.items()
    }


def _check_record(record: Any, path: Path, number: int) -> None:
    ok = isinstance(record, dict) and record.get("stage") in TRAINED_STAGES
    ok = ok and all(key in record for key in ("epoch", "loss", "accuracy"))
    check(ok, path, f"line {number} must hold stage, epoch and the numbers loss and accuracy")
    for key, hint in _NUMBERS.items():
        try:
            _JSON.decode(record.get(key), hint, key)
        except CodecError as error:
            raise ReportError(f"{path}, line {number} is broken: {error}") from error
