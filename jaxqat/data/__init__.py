"""Image-classification data: decoded once to uint8, resident on the device, augmented there."""

from jaxqat.data.arrays import DataError, Split
from jaxqat.data.datasets import DataConfig, Dataset, load_dataset
from jaxqat.data.pipeline import (
    AugmentConfig,
    EvalBatches,
    augment,
    epoch_permutation,
    eval_batches,
    normalize,
)

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "DataError",
    "Dataset",
    "EvalBatches",
    "Split",
    "augment",
    "epoch_permutation",
    "eval_batches",
    "load_dataset",
    "normalize",
]
