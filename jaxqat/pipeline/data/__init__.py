"""Image-classification data: decoded once to uint8, then kept and augmented on the device."""

from jaxqat.pipeline.data.arrays import DataError, Split
from jaxqat.pipeline.data.datasets import Dataset, load_dataset
from jaxqat.pipeline.data.pipeline import (
    EvalBatches,
    augment,
    epoch_permutation,
    eval_batches,
    normalize,
)
from jaxqat.pipeline.settings.data import AugmentConfig, DataConfig

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
