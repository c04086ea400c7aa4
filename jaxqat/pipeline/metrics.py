"""What a classifier got right, and what its weights weigh.

The quality measures are scikit-learn's, over all predictions of a split at once (never
averaged over batches). Everything returned is plain Python and goes into JSON as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

FLOAT32_BYTES = 4
INT32_BYTES = 4
CODE_BYTES = 1


def classification_metrics(
    labels: Int[np.ndarray, "n"],
    logits: Float[np.ndarray, "n k"],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Quality of predictions over a whole split: accuracy, macro averages, loss, confusion.

    The prediction is the largest logit, the first of equal ones. Precision, recall and F1
    are computed per class over `range(k)` and averaged with equal weights ("macro"). Where
    one has no denominator (a class that is never predicted has no precision, one without
    images has no recall) it counts as 0, so that a model that ignores a class pays for it.
    The loss is the mean cross-entropy in nats, without label smoothing, in float64.

    Args:
        labels: True classes, 0 to k - 1. Classes may be absent.
        logits: Unnormalised scores of the same images; all finite.
        class_names: Names of the k classes, in the order of the logits.

    Returns:
        `accuracy`, `precision`, `recall`, `f1` (fractions of 1), `loss`,
        `confusion_matrix` (k lists of k counts: rows true, columns predicted),
        `per_class` (a list of `name`, `precision`, `recall`, `f1`, `support`) and `n`.

    Raises:
        ValueError: If shapes disagree, there are no images, a label is out of range or a
            logit is not finite.
    """
    labels, logits = np.asarray(labels), np.asarray(logits, np.float64)
    _check_predictions(labels, logits, class_names)
    n, k = logits.shape
    predicted = logits.argmax(axis=1)
    zero: Any = 0  # Documented as a number, annotated as a string.
    precision, recall, f1, support = (
        np.asarray(column)
        for column in precision_recall_fscore_support(
            labels, predicted, labels=range(k), average=None, zero_division=zero
        )
    )
    log_likelihood = log_softmax(logits, axis=1)[np.arange(n), labels]
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "loss": float(-log_likelihood.mean()),
        "confusion_matrix": confusion_matrix(labels, predicted, labels=range(k)).tolist(),
        "per_class": [
            {
                "name": str(name),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(class_names)
        ],
        "n": int(n),
    }


def _check_predictions(labels: np.ndarray, logits: np.ndarray, class_names: Sequence[str]) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
        raise ValueError(
            "labels must be [n] and logits [n, k] with n of at least 1, "
            f"got shapes {labels.shape} and {logits.shape}."
        )
    if len(class_names) != logits.shape[1]:
        raise ValueError(
            f"class_names must name the {logits.shape[1]} columns of the logits, "
            f"got {len(class_names)} names."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be in 0..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}."
        )
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        raise ValueError(f"logits must be finite, those of image {bad} are {logits[bad]}.")


def weight_bytes(params: Mapping[str, Any], bits: Mapping[str, int | None]) -> dict[str, int]:
    """Bytes that the weights take in float32, and with the named kernels as int8 codes.

    A quantized kernel costs one byte a code, whatever its bits (as in memory; a saved
    network packs codes of few bits), and one float32 scale per output channel, its last axis.
    Biases of quantized layers become int32; all else (batch norm, layers left in float) stays
    float32: both take the four bytes they took before. Batch-norm statistics are state,
    not weights, and count on neither side.

    Args:
        params: Nested dictionaries of arrays, or of anything with a `shape`.
        bits: Bits of the weight codes by path, 'stage1/block0/conv1/kernel' or, for an
            array called `kernel`, the layer's 'stage1/block0/conv1'. None leaves a
            path in float.

    Returns:
        `parameters` (how many numbers), `fp32` and `int8` (bytes).

    Raises:
        ValueError: If a path of `bits` is not in `params`, or bits are outside 2..8.
    """
    shapes = dict(_leaf_shapes(params))
    weights = {path: _find_weight(path, shapes) for path in bits}
    quantized = {weights[path] for path, width in bits.items() if _is_quantized(path, width)}
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    codes = sum(int(np.prod(shapes[path])) for path in quantized)
    scales = sum(int(shapes[path][-1]) for path in quantized)
    return {
        "parameters": parameters,
        "fp32": FLOAT32_BYTES * parameters,
        "int8": CODE_BYTES * codes + FLOAT32_BYTES * scales + INT32_BYTES * (parameters - codes),
    }


def _leaf_shapes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaf_shapes(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", tuple(value.shape)


def _is_quantized(path: str, bits: int | None) -> bool:
    if bits is not None and not 2 <= bits <= 8:
        raise ValueError(f"bits of {path!r} must be in 2..8 or None, got {bits!r}.")
    return bits is not None


def _find_weight(path: str, shapes: Mapping[str, tuple]) -> str:
    for candidate in (path, f"{path}/kernel"):
        if shapes.get(candidate):
            return candidate
    raise ValueError(
        f"bits names {path!r}, which is no weight of the parameters; they hold, for "
        f"example, {sorted(shapes)[:3]}."
    )
