"""The run folder as the report reads it: checked once, here, and trusted from then on.

Needed are `results.json`, `metrics.jsonl` and `config.yaml`. The sample images in
`report_data.npz` are optional; so are the parts of `results.json` beyond its name and its
stages, because a run without a QAT stage has no int8 size and no quantized layers.
"""

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from jaxtyping import Int, UInt8

SAMPLES_FILE = "report_data.npz"
STAGES = ("fp32", "qat", "int8")
SCORES = ("accuracy", "precision", "recall", "f1", "loss")
_NUMBER = (int, float)


class ReportError(ValueError):
    """A run folder that no report can be drawn from; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of the test split with their true labels."""

    images: UInt8[np.ndarray, "m h w c"]
    labels: Int[np.ndarray, "m"]
    class_names: tuple[str, ...]


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
        return tuple(stage for stage in STAGES if stage in self.results)


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
    _check(isinstance(config, dict), path, "must hold a mapping of settings")
    return config


def _read_results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ReportError(f"{path} is not JSON: {error}.") from error
    _check(isinstance(results, dict), path, "must hold an object")
    _check(isinstance(results.get("name"), str), path, "lacks the text 'name'")
    stages = [stage for stage in STAGES if stage in results]
    _check(bool(stages), path, f"holds none of the stages {', '.join(STAGES)}")
    for stage in stages:
        _check_stage(results[stage], stage, path)
    for key in ("size_bytes", "speed", "data", "environment"):
        _check(isinstance(results.get(key, {}), dict), path, f"{key!r} must be an object")
    layers = results.get("layers", [])
    _check(
        isinstance(layers, list)
        and all(isinstance(layer, dict) and "path" in layer for layer in layers),
        path,
        "'layers' must be a list of objects with a 'path'",
    )
    return results


def _check_stage(stage: Any, name: str, path: Path) -> None:
    _check(isinstance(stage, dict), path, f"{name!r} must be an object")
    calibrated = stage.get("calibrated")
    for key, split in ((name, stage), (f"{name}.calibrated", calibrated)):
        if split is not None:
            test = split.get("test") if isinstance(split, dict) else None
            _check_scores(test, f"{key}.test", path)


def _check_scores(test: Any, key: str, path: Path) -> None:
    _check(isinstance(test, dict), path, f"lacks the object '{key}'")
    for score in SCORES:
        _check(_is_number(test.get(score)), path, f"lacks the number '{key}.{score}'")
    per_class = test.get("per_class")
    _check(isinstance(per_class, list), path, f"lacks the list '{key}.per_class'")
    for row in per_class:
        _check(
            isinstance(row, dict)
            and {"name", "precision", "recall", "f1", "support"} <= row.keys(),
            path,
            f"'{key}.per_class' must hold name, precision, recall, f1 and support",
        )
    matrix, k = test.get("confusion_matrix"), len(per_class)
    _check(
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
    _check(bool(by_stage), path, "holds no epoch")
    return {
        stage: [records[epoch] for epoch in sorted(records)]
        for stage, records in by_stage.items()
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
    _check(ok, path, f"line {number} must hold stage, epoch and the numbers loss and accuracy")


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool)


def _check(ok: bool, path: Path, problem: str) -> None:
    if not ok:
        raise ReportError(f"{path} is broken: {problem}.")


def read_samples(workdir: Path) -> Samples | None:
    """The sample images of a run, or None where it kept none.

    Raises:
        ReportError: If the file is there and broken.
    """
    path = workdir / SAMPLES_FILE
    try:
        with np.load(path, allow_pickle=False) as data:
            images, labels, names = (data[key] for key in ("images", "labels", "class_names"))
    except FileNotFoundError:
        return None
    except (AttributeError, EOFError, KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ReportError(f"{path} is broken: {error}.") from error
    _check(_are_samples(images, labels), path, "must hold uint8[m, h, w, c] images and m labels")
    in_range = not labels.size or 0 <= labels.min() <= labels.max() < len(names)
    _check(in_range, path, f"labels must be in 0..{len(names) - 1}")
    return Samples(images=images, labels=labels, class_names=tuple(map(str, names)))


def write_samples(
    workdir: Path,
    images: UInt8[np.ndarray, "m h w c"],
    labels: Int[np.ndarray, "m"],
    class_names: Sequence[str],
) -> Path:
    """Keeps a few images with their true labels in the run folder, for the report.

    Raises:
        ValueError: If the images are not uint8[m, h, w, c] or the labels do not fit them.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if not _are_samples(images, labels):
        raise ValueError(
            "samples must be uint8[m, h, w, c] with integer labels [m], "
            f"got {images.dtype}{list(images.shape)} and {labels.dtype}{list(labels.shape)}."
        )
    names = np.array([str(name) for name in class_names])
    path = workdir / SAMPLES_FILE
    write_atomically(
        path, lambda file: np.savez(file, images=images, labels=labels, class_names=names)
    )
    return path


def _are_samples(images: np.ndarray, labels: np.ndarray) -> bool:
    return (
        images.ndim == 4
        and images.dtype == np.uint8
        and labels.shape == images.shape[:1]
        and np.issubdtype(labels.dtype, np.integer)
    )


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Gives `path` its new content in one step: a reader sees the old file or the new one.

    Args:
        path: File to create or replace; its folder exists.
        write: Called with a binary file to fill.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
