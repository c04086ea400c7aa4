"""Scores of a classifier: scikit-learn's metrics over a whole split, not averaged over batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from jaxqat.pipeline.scores import ClassScores, Scores


def classification_metrics(
    labels: Int[np.ndarray, "n"],
    logits: Float[np.ndarray, "n k"],
    class_names: Sequence[str],
) -> Scores:
    """Return the scores of predictions over a whole split.

    The prediction is the largest logit, of equal ones the first. Precision, recall and F1 are
    computed per class and averaged over all k classes with equal weights ("macro"). A score
    without a denominator is 0: precision of a class that is never predicted, recall of a class
    without images. The loss is the mean cross-entropy in nats, in float64, without label
    smoothing.

    Args:
        labels: True classes, 0 to k - 1; not all need occur.
        logits: Unnormalised scores of the same images; all finite.
        class_names: Names of the k classes, in the order of the logits.

    Raises:
        ValueError: If shapes disagree, there are no images, a label is out of range or a
            logit is not finite.
    """
    labels, logits = np.asarray(labels), np.asarray(logits, np.float64)
    _check_predictions(labels, logits, class_names)
    n, k = logits.shape
    predicted = logits.argmax(axis=1)
    zero: Any = 0  # scikit-learn documents a number but annotates a string.
    precision, recall, f1, support = (
        np.asarray(column)
        for column in precision_recall_fscore_support(
            labels, predicted, labels=range(k), average=None, zero_division=zero
        )
    )
    log_likelihood = log_softmax(logits, axis=1)[np.arange(n), labels]
    matrix = confusion_matrix(labels, predicted, labels=range(k))
    return Scores(
        accuracy=float(np.mean(predicted == labels)),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        loss=float(-log_likelihood.mean()),
        confusion_matrix=tuple(map(tuple, matrix.tolist())),
        per_class=tuple(
            ClassScores(
                name=str(name),
                precision=float(precision[i]),
                recall=float(recall[i]),
                f1=float(f1[i]),
                support=int(support[i]),
            )
            for i, name in enumerate(class_names)
        ),
        n=int(n),
    )


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
