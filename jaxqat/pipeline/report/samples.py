"""The images of a report: a few test images in the run folder, with what the networks say.

Three groups of images are kept: samples of several classes, images whose class differs between the
float and the integer network, and the errors that the integer network is most sure of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxqat.integer._store.arrays import read_arrays
from jaxqat.integer._store.files import read_regular, write_atomically
from jaxqat.pipeline.report.files import ReportError, check

SAMPLES_FILE = "report_data.npz"
MAX_BYTES = 2**30
MAX_SAMPLES = 20
MAX_PER_GALLERY = 18  # Of changed classes, and of errors.
_ARRAYS = (
    *("images", "labels", "class_names", "networks", "predicted", "probabilities"),
    *("samples", "changed", "errors", "totals"),
)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of the test split, with their true labels and the predictions of networks.

    Attributes:
        images: The images.
        labels: Their true classes.
        class_names: Names of the classes.
        networks: Names of the networks, the float network first.
        predicted: Class that each network gives each image.
        probabilities: Its probability (softmax of the logits).
        samples: Places of images of several classes.
        changed: Places of images whose class differs between the first and the last network.
        errors: Places of images that the last network takes for another class, the surest first.
        totals: Number of images of the test split, of those whose class changed, and of errors.
    """

    images: UInt8[np.ndarray, "m h w c"]
    labels: Int[np.ndarray, "m"]
    class_names: tuple[str, ...]
    networks: tuple[str, ...]
    predicted: Int[np.ndarray, "k m"]
    probabilities: Float[np.ndarray, "k m"]
    samples: Int[np.ndarray, "a"]
    changed: Int[np.ndarray, "b"]
    errors: Int[np.ndarray, "c"]
    totals: Int[np.ndarray, "3"]


def choose_samples(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"],
    class_names: Sequence[str],
    logits: Mapping[str, Float[np.ndarray, "n classes"]],
) -> Samples:
    """Choose the images of a report from a split.

    Args:
        images: All images of the split.
        labels: Their true classes.
        class_names: Names of the classes.
        logits: Logits of each network by its name, the float network first; the last one is the
            network that the report is about.

    Raises:
        ValueError: If the images are not uint8[m, h, w, c] or the labels not integers [m].
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if not _are_images(images, labels):
        raise ValueError(
            "samples must be uint8[m, h, w, c] with integer labels [m], "
            f"got {images.dtype}{list(images.shape)} and {labels.dtype}{list(labels.shape)}."
        )
    shares = [_softmax(np.asarray(each, np.float64)) for each in logits.values()]
    predicted = np.array([each.argmax(-1) for each in shares], np.int64)
    sure = np.array([each.max(-1) for each in shares], np.float32)
    changed = np.flatnonzero(predicted[0] != predicted[-1])
    wrong = np.flatnonzero(predicted[-1] != labels)
    # The surest first; of equal ones, in the order of the split.
    groups = (
        _spread(labels)[:MAX_SAMPLES],
        changed[np.argsort(-sure[-1][changed], kind="stable")][:MAX_PER_GALLERY],
        wrong[np.argsort(-sure[-1][wrong], kind="stable")][:MAX_PER_GALLERY],
    )
    kept, places = np.unique(np.concatenate(groups), return_inverse=True)
    samples, changes, errors = np.split(places, np.cumsum([len(group) for group in groups])[:-1])
    return Samples(
        images=images[kept],
        labels=labels[kept],
        class_names=tuple(map(str, class_names)),
        networks=tuple(logits),
        predicted=predicted[:, kept],
        probabilities=sure[:, kept],
        samples=samples,
        changed=changes,
        errors=errors,
        totals=np.array([len(labels), len(changed), len(wrong)]),
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _spread(labels: np.ndarray) -> np.ndarray:
    """Return all places in an order of many classes: the first image of each, then the second."""
    order = np.argsort(labels, kind="stable")
    _, counts = np.unique(labels, return_counts=True)
    rounds = np.empty(len(labels), np.int64)
    rounds[order] = np.concatenate([np.arange(n) for n in counts] or [np.arange(0)])
    return np.lexsort((labels, rounds))


def read_samples(workdir: Path) -> Samples | None:
    """Read the sample images of a run; None if it saved none.

    Raises:
        ReportError: If the file is broken.
    """
    path = workdir / SAMPLES_FILE
    try:
        data, _ = read_arrays(read_regular(path, limit=MAX_BYTES), _ARRAYS)
        images, labels, names = (data[key] for key in _ARRAYS[:3])
    except FileNotFoundError:
        return None
    except Exception as error:  # NumPy and zipfile raise many types on damage.
        raise ReportError(f"{path} is broken: {error}.") from error
    check(
        names.ndim == 1 and _are_images(images, labels),
        path,
        "must hold uint8[m, h, w, c] images and m labels",
    )
    _check_range(path, "labels", labels, len(names))
    found = _without_predictions(len(images)) | data
    networks, predicted, shares = (found[k] for k in ("networks", "predicted", "probabilities"))
    shape = (*networks.shape, len(images))
    check(
        len(shape) == 2 and predicted.shape == shares.shape == shape,
        path,
        f"must hold predictions of shape (networks, {len(images)}), got {predicted.shape}",
    )
    _check_range(path, "predicted", predicted, len(names))
    check(
        shares.dtype.kind == "f" and bool(((shares >= 0) & (shares <= 1)).all()),
        path,
        "probabilities must be in 0..1",
    )
    for group in ("samples", "changed", "errors"):
        check(found[group].ndim == 1, path, f"{group} must be a list")
        _check_range(path, group, found[group], len(images))
    check(found["totals"].shape == (3,), path, "totals must be three counts")
    _check_range(path, "totals", found["totals"], 2**53)
    texts: Any = {key: tuple(map(str, found[key])) for key in ("class_names", "networks")}
    return Samples(**found | texts)


def _without_predictions(count: int) -> dict[str, np.ndarray]:
    """Return what is missing from the files of older versions, which held no predictions."""
    none = np.zeros(0, np.int64)
    return {
        "networks": np.array([], np.str_),
        "predicted": np.zeros((0, count), np.int64),
        "probabilities": np.zeros((0, count), np.float32),
        "samples": np.arange(min(count, MAX_SAMPLES)),
        "changed": none,
        "errors": none,
        "totals": np.zeros(3, np.int64),
    }


def _check_range(path: Path, name: str, numbers: np.ndarray, end: int) -> None:
    whole = not numbers.size or np.issubdtype(numbers.dtype, np.integer)
    in_range = whole and (not numbers.size or 0 <= numbers.min() <= numbers.max() < end)
    check(bool(in_range), path, f"{name} must be in 0..{end - 1}")


def write_samples(workdir: Path, samples: Samples) -> Path:
    """Save the images of a report in the run folder.

    Raises:
        ReportError: If the file cannot be written.
    """
    path = workdir / SAMPLES_FILE
    arrays: Any = {name: np.asarray(getattr(samples, name)) for name in _ARRAYS}

    def save(file: IO[bytes]) -> None:
        np.savez(file, **arrays)

    write_atomically(path, save, error=ReportError)
    return path


def _are_images(images: np.ndarray, labels: np.ndarray) -> bool:
    return (
        images.ndim == 4
        and images.dtype == np.uint8
        and labels.shape == images.shape[:1]
        and np.issubdtype(labels.dtype, np.integer)
    )
