"""Networks on whole splits: the logits of every image, and their scores."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxqat.integer._execute.executor import make_executor
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.data import DataError, Dataset, Split, eval_batches
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.progress import Work
from jaxqat.pipeline.results import Scores
from jaxqat.pipeline.terminal import tell


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

    def logits(
        self,
        split: Split,
        *variables: Any,
        advance: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Return the logits of every image of a split, in order, each once.

        Args:
            split: The images.
            *variables: The network's.
            advance: Called with the number of images after each batch.
        """
        variables = jax.device_put(variables)
        batches = eval_batches(split, self.batch_size)
        logits = []
        for images in batches.images:
            logits.append(self.predict(*variables, images))
            if advance is not None and len(logits) > 1:  # The device has one batch to do.
                jax.block_until_ready(logits[-2])
                advance(self.batch_size)
        jax.block_until_ready(logits)
        if advance is not None:
            advance(len(split) - self.batch_size * (len(logits) - 1))
        return np.concatenate(jax.device_get(logits))[batches.mask.reshape(-1)]


def measure(
    predictor: Predictor,
    split: Split,
    class_names: tuple[str, ...],
    *variables: Any,
    what: str = "",
    console: Console | None = None,
) -> Measured:
    """Return scores and logits over a split, and its speed without the time of compilation.

    Args:
        predictor: The network.
        split: The images.
        class_names: Names of the classes, in the order of the logits.
        *variables: The network's variables; none for an integer network.
        what: What a person calls the network.
        console: Shows the progress; None for no progress.
    """
    tell(f"{what}: compiling for evaluation", console)
    predictor.logits(split.take(np.arange(1)), *variables)
    with Work(console, f"{what}: evaluating {len(split):,} images", len(split)) as work:
        start = time.perf_counter()
        values = predictor.logits(split, *variables, advance=work.advance)
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
