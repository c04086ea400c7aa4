"""The sample images of a report: a few test images in the run folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int, UInt8

from jaxqat.integer._store.arrays import read_arrays
from jaxqat.integer._store.files import read_regular, write_atomically
from jaxqat.pipeline.report.files import ReportError, check

SAMPLES_FILE = "report_data.npz"
MAX_BYTES = 2**30
_ARRAYS = ("images", "labels", "class_names")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of the test split with their true labels."""

    images: UInt8[np.ndarray, "m h w c"]
    labels: Int[np.ndarray, "m"]
    class_names: tuple[str, ...]


def read_samples(workdir: Path) -> Samples | None:
    """Read the sample images of a run; None if it saved none.

    Raises:
        ReportError: If the file is broken.
    """
    path = workdir / SAMPLES_FILE
    try:
        data, _ = read_arrays(read_regular(path, limit=MAX_BYTES), _ARRAYS)
        images, labels, names = (data[key] for key in _ARRAYS)
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy and zipfile raise many types on damage.
        raise ReportError(f"{path} is broken: {error}.") from error
    check(
        names.ndim == 1 and _are_samples(images, labels),
        path,
        "must hold uint8[m, h, w, c] images and m labels",
    )
    in_range = not labels.size or 0 <= labels.min() <= labels.max() < len(names)
    check(in_range, path, f"labels must be in 0..{len(names) - 1}")
    return Samples(images=images, labels=labels, class_names=tuple(map(str, names)))


def write_samples(
    workdir: Path,
    images: UInt8[np.ndarray, "m h w c"],
    labels: Int[np.ndarray, "m"],
    class_names: Sequence[str],
) -> Path:
    """Save a few images with their true labels in the run folder, for the report.

    Raises:
        ValueError: If the images are not uint8[m, h, w, c] or the labels not integers [m].
        ReportError: If the file cannot be written.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if not _are_samples(images, labels):
        raise ValueError(
            "samples must be uint8[m, h, w, c] with integer labels [m], "
            f"got {images.dtype}{list(images.shape)} and {labels.dtype}{list(labels.shape)}."
        )
    names = np.array([str(name) for name in class_names])
    path = workdir / SAMPLES_FILE

    def save(file: IO[bytes]) -> None:
        np.savez(file, images=images, labels=labels, class_names=names)

    write_atomically(path, save, error=ReportError)
    return path


def _are_samples(images: np.ndarray, labels: np.ndarray) -> bool:
    return (
        images.ndim == 4
        and images.dtype == np.uint8
        and labels.shape == images.shape[:1]
        and np.issubdtype(labels.dtype, np.integer)
    )
