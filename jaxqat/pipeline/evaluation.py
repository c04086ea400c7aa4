"""Networks on whole splits: every image once, in order, and what the answers are worth."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxqat.integer._execute.executor import make_executor
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.data import DataError, Dataset, Split, eval_batches
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.networks import Networks

SPLITS = ("test", "train", "validation")

Logits = Callable[[Split], np.ndarray]


class Evaluator:
    """Logits of a trained stage's network.

    Attributes:
        predict: See `Networks.predictor`.
        batch_size: Images per call.
    """

    def __init__(self, networks: Networks, stage: str):
        self.predict = networks.predictor(stage)
        self.batch_size = networks.experiment.evaluation_batch_size

    def logits(self, params: Any, collections: Mapping[str, Any], split: Split) -> np.ndarray:
        """Logits of every image of a split, each once."""
        variables = jax.device_put({"params": params, **collections})
        return _logits(partial(self.predict, variables), split, self.batch_size)


class IntegerEvaluator:
    """Logits of an integer network that takes images as they are, uint8.

    Attributes:
        predict: uint8 images -> logits, compiled.
        batch_size: Images per call.
    """

    def __init__(self, graph: IntegerGraph, batch_size: int):
        self.predict = make_executor(graph)
        self.batch_size = batch_size

    def logits(self, split: Split) -> np.ndarray:
        """Logits of every image of a split, each once."""
        return _logits(self.predict, split, self.batch_size)


def _logits(predict: Callable[[Any], Any], split: Split, batch_size: int) -> np.ndarray:
    batches = eval_batches(split, batch_size)
    logits = [predict(images) for images in batches.images]
    return np.concatenate(jax.device_get(logits))[batches.mask.reshape(-1)]


def measure(
    logits: Logits, split: Split, class_names: tuple[str, ...]
) -> tuple[dict[str, Any], float]:
    """Metrics over a split and images/s, the compilation not counted."""
    logits(split.take(np.arange(1)))
    start = time.perf_counter()
    values = logits(split)
    seconds = time.perf_counter() - start
    return classification_metrics(split.labels, values, class_names), len(split) / seconds


def find_split(dataset: Dataset, name: str) -> Split:
    """The split of this name.

    Raises:
        DataError: If the data has none of this name.
    """
    split = getattr(dataset, name)
    if split is None:
        raise DataError("this run has no validation split (data.validation_size is 0).")
    return split
