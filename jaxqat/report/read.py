"""The run folder as the report reads it: checked once, here, and then trusted."""

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int, UInt8

SAMPLES_FILE = "report_data.npz"


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
    results: dict[str, Any]
    epochs: dict[str, list[dict[str, Any]]]  # Lines of metrics.jsonl by stage, in order.
    samples: Samples | None


def read_run(workdir: Path) -> Run:
    """Reads what the report needs of a run folder.

    Raises:
        ReportError: If a file is missing or broken.
    """
    results = json.loads((workdir / "results.json").read_text())
    epochs: dict[str, list[dict[str, Any]]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        epochs.setdefault(record["stage"], []).append(record)
    config = yaml.safe_load((workdir / "config.yaml").read_text())
    return Run(config=config, results=results, epochs=epochs, samples=read_samples(workdir))


def read_samples(workdir: Path) -> Samples | None:
    """The sample images of a run, or None where it kept none."""
    path = workdir / SAMPLES_FILE
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            return Samples(
                images=data["images"],
                labels=data["labels"],
                class_names=tuple(str(name) for name in data["class_names"]),
            )
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ReportError(f"{path} is broken: {error}.") from error


def write_samples(
    workdir: Path,
    images: UInt8[np.ndarray, "m h w c"],
    labels: Int[np.ndarray, "m"],
    class_names: Sequence[str],
) -> Path:
    """Keeps a few images with their true labels in the run folder, for the report.

    Raises:
        ValueError: If the images are not uint8[m, h, w, c] or labels do not fit them.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            "samples must be uint8[m, h, w, c] with labels [m], "
            f"got {images.dtype}{list(images.shape)} and {list(labels.shape)}."
        )
    path = workdir / SAMPLES_FILE
    write_atomically(
        path,
        lambda file: np.savez(
            file, images=images, labels=labels, class_names=np.array([str(n) for n in class_names])
        ),
    )
    return path


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Gives `path` its new content in one step: a reader sees the old file or the new one.

    Args:
        path: File to create or replace; its folder exists.
        write: Called with a binary file to fill.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner reads.
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
