"""Scores of a classifier on a split."""

import dataclasses

from jaxqat.pipeline.bounded_json import Amount, Count, Share

REESTIMATED = (
    "FP32 has batch norm's statistics of its training; for the other networks they were estimated "
    "again (qat.reestimate_batch_norm), so their scores differ by more than quantization."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Scores of the predictions for one class.

    Attributes:
        name: Name of the class.
        precision: Share of its predictions that are correct, 0..1.
        recall: Share of its images that are classified correctly, 0..1.
        f1: Harmonic mean of the two.
        support: Number of its images.
    """

    name: str
    precision: Share
    recall: Share
    f1: Share
    support: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a classifier on a split.

    Attributes:
        accuracy: Share of the images that are classified correctly, 0..1.
        precision: Precision, mean over the classes with equal weights.
        recall: Recall, mean over the classes with equal weights.
        f1: F1, mean over the classes with equal weights.
        loss: Mean cross-entropy, in nats.
        confusion_matrix: Counts of images, by true class (row) and predicted class (column).
        per_class: Scores of each class, in the order of the matrix.
        n: Number of images.
    """

    accuracy: Share
    precision: Share
    recall: Share
    f1: Share
    loss: Amount
    confusion_matrix: tuple[tuple[Count, ...], ...]
    per_class: tuple[ClassScores, ...]
    n: Count

    def __post_init__(self):
        k = len(self.per_class)
        lengths = [len(row) for row in self.confusion_matrix]
        if lengths != [k] * k:
            raise ValueError(
                f"confusion_matrix must be {k} lists of {k} counts, one for each class of "
                f"per_class; got lists of {lengths}."
            )
        if (images := sum(map(sum, self.confusion_matrix))) != self.n:
            raise ValueError(f"confusion_matrix counts {images} images, and n is {self.n}.")
