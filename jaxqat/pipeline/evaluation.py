"""Networks on whole splits: the logits of every image, and their scores."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxqat.integer._execute.executor import make_executor
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.data import DataError, Dataset, Split, eval_batches
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.results import Scores

Logits = Callable[[Split], np.ndarray]


class Measured(NamedTuple):
    """Scores of a network on a split, images per second, and the logits of every image."""

    scores: Scores
    images_per_s: float
    logits: np.ndarray


class Predictor:
    """A compiled network that gives the logits of whole splits.

    Attributes:
        predict: (*variables, uint8 images) -> logits, compiled.
        batch_size: Images per call.
    """

    def __init__(self, predict: Callable[..., Any], batch_size: int):
        self.predict = predict
        self.batch_size = batch_size

    @classmethod
    def of_stage(cls, networks: Networks, stage: str) -> "Predictor":
        """Return the predictor of a stage's network; `logits` takes its variables."""
        return cls(networks.predictor(stage), networks.experiment.evaluation_batch_size)

    @classmethod
    def of_graph(cls, graph: IntegerGraph, batch_size: int) -> "Predictor":
        """Return the predictor of an integer network; `logits` takes the split alone."""
        return cls(make_executor(graph), batch_size)

    def logits(self, split: Split, *variables: Any) -> np.ndarray:
        """Return the logits of every image of a split, in order, each once."""
        variables = jax.device_put(variables)
        batches = eval_batches(split, self.batch_size)
        logits = [self.predict(*variables, images) for images in batches.images]
        return np.concatenate(jax.device_get(logits))[batches.mask.reshape(-1)]


def measure(logits: Logits, split: Split, class_names: tuple[str, ...]) -> Measured:
    """Return scores and logits over a split, and its speed without the time of compilation."""
    logits(split.take(np.arange(1)))
    start = time.perf_counter()
    values = logits(split)
    seconds = time.perf_counter() - start
    scores = classification_metrics(split.labels, values, class_names)
    return Measured(scores, len(split) / seconds, values)


def find_split(dataset: Dataset, name: str) -> Split:
    """Return the split of this name.

    Raises:
        DataError: If the data has no such split.
    """
    split = getattr(dataset, name)
    if split is None:
        raise DataError("this run has no validation split (data.validation_size is 0).")
    return split
