"""The run folder as the report reads it: checked once, here, and trusted from then on.

Needed are `results.json`, `metrics.jsonl` and `config.yaml`. The sample images in
`report_data.npz` are optional; so are the parts of `results.json` beyond its name and its
stages, because a run without a QAT stage has no int8 size and no quantized layers, and a run of an
older version no integer network.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxqat.pipeline.report.files import ReportError, check
from jaxqat.pipeline.report.samples import Samples, read_samples

STAGES = ("fp32", "ptq", "qat", "integer")
SCORES = ("accuracy", "precision", "recall", "f1", "loss")
_NUMBER = (int, float)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run left behind."""

    config: dict[str, Any]
    config_text: str
    results: dict[str, Any]
    epochs: dict[str, list[dict[str, Any]]]  # Lines of metrics.jsonl by stage, in order.
    samples: Samples | None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that were evaluated, in the order in which they are made."""
        return tuple(_evaluated(self.results))

    @property
    def no_network(self) -> str | None:
        """Why the run has no integer network, where it was to have one."""
        return (self.results.get("integer") or {}).get("error")


def read_run(workdir: Path) -> Run:
    """Reads and checks what the report needs of a run folder.

    Raises:
        ReportError: If a file is missing or broken.
    """
    config_text = _read_text(workdir / "config.yaml")
    return Run(
        config=_parse_config(config_text, workdir / "config.yaml"),
        config_text=config_text,
        results=_read_results(workdir / "results.json"),
        epochs=_read_epochs(workdir / "metrics.jsonl"),
        samples=read_samples(workdir),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ReportError(
            f"{path} is missing: a report needs the folder of a run that has been evaluated."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}.") from error


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ReportError(f"{path} is not YAML: {error}.") from error
    check(isinstance(config, dict), path, "must hold a mapping of settings")
    return config


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not JSON: {error}.") from error
    check(isinstance(results, dict), path, "must hold an object")
    check(isinstance(results.get("name"), str), path, "lacks the text 'name'")
    integer = results.get("integer") or {}
    check(isinstance(integer, dict), path, "'integer' must be an object")
    check(isinstance(integer.get("error", ""), str), path, "'integer.error' must be a text")
    stages = _evaluated(results)
    check(bool(stages), path, f"holds none of the stages {', '.join(STAGES)}")
    for stage in stages:
        _check_stage(results[stage], stage, path)
    if "ptq" in stages:
        failures = (results["ptq"].get("verify") or {}).get("failures", [])
        check(isinstance(failures, list), path, "'ptq.verify.failures' must be a list")
    classes = {len(results[stage]["test"]["per_class"]) for stage in stages}
    check(len(classes) == 1, path, f"its stages know different numbers of classes, {classes}")
    for key in ("size_bytes", "speed", "data", "environment"):
        check(isinstance(results.get(key) or {}, dict), path, f"{key!r} must be an object")
    if results.get("verify") is not None:
        _check_verification(results["verify"], path)
    layers = results.get("layers") or []
    check(
        isinstance(layers, list)
        and all(isinstance(layer, dict) and "path" in layer for layer in layers),
        path,
        "'layers' must be a list of objects with a 'path'",
    )
    return results


def _evaluated(results: dict[str, Any]) -> list[str]:
    """The stages that results hold; an integer network that could not be made is none."""
    made = "error" not in (results.get("integer") or {})
    return [stage for stage in STAGES if stage in results and (made or stage != "integer")]


def _check_stage(stage: Any, name: str, path: Path) -> None:
    check(isinstance(stage, dict), path, f"{name!r} must be an object")
    calibrated = stage.get("calibrated")
    for key, split in ((name, stage), (f"{name}.calibrated", calibrated)):
        if split is not None:
            test = split.get("test") if isinstance(split, dict) else None
            _check_scores(test, f"{key}.test", path)


def _check_verification(verification: Any, path: Path) -> None:
    check(isinstance(verification, dict), path, "'verify' must be an object")
    for key in ("images", "codes", "differing", "largest", "top1_flips"):
        check(_is_number(verification.get(key)), path, f"lacks the number 'verify.{key}'")
    failures = verification.get("failures")
    texts = isinstance(failures, list) and all(isinstance(text, str) for text in failures)
    check(texts, path, "'verify.failures' must be a list of texts")
    tensors = verification.get("tensors")
    check(isinstance(tensors, list), path, "lacks the list 'verify.tensors'")
    for row in tensors:
        ok = (
            isinstance(row, dict)
            and isinstance(row.get("name"), str)
            and all(_is_number(row.get(key)) for key in ("codes", "differing", "largest"))
            and (row.get("sqnr_db") is None or _is_number(row["sqnr_db"]))
        )
        right = "name, codes, differing, largest and sqnr_db"
        check(ok, path, f"'verify.tensors' must hold {right}")


def _check_scores(test: Any, key: str, path: Path) -> None:
    check(isinstance(test, dict), path, f"lacks the object '{key}'")
    for score in SCORES:
        check(_is_number(test.get(score)), path, f"lacks the number '{key}.{score}'")
    per_class = test.get("per_class")
    check(isinstance(per_class, list), path, f"lacks the list '{key}.per_class'")
    for row in per_class:
        check(
            isinstance(row, dict)
            and {"name", "precision", "recall", "f1", "support"} <= row.keys(),
            path,
            f"'{key}.per_class' must hold name, precision, recall, f1 and support",
        )
    matrix, k = test.get("confusion_matrix"), len(per_class)
    check(
        isinstance(matrix, list)
        and len(matrix) == k
        and all(isinstance(row, list) and len(row) == k for row in matrix)
        and all(_is_number(count) for row in matrix for count in row),
        path,
        f"'{key}.confusion_matrix' must be {k} lists of {k} counts",
    )


def _read_epochs(path: Path) -> dict[str, list[dict[str, Any]]]:
    by_stage: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}, line {number} is not JSON: {error}.") from error
        _check_record(record, path, number)
        # An epoch that a resumed run did again stands twice; its last line holds.
        by_stage.setdefault(record["stage"], {})[record["epoch"]] = record
    check(bool(by_stage), path, "holds no epoch")
    return {
        stage: [records[epoch] for epoch in sorted(records)] for stage, records in by_stage.items()
    }


def _check_record(record: Any, path: Path, number: int) -> None:
    ok = (
        isinstance(record, dict)
        and isinstance(record.get("stage"), str)
        and type(record.get("epoch")) is int
        and all(key in record for key in ("loss", "accuracy"))
        and all(
            record.get(key) is None or _is_number(record[key])
            for key in ("loss", "accuracy", "validation_loss", "validation_accuracy")
        )
    )
    check(ok, path, f"line {number} must hold stage, epoch and the numbers loss and accuracy")


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool)
