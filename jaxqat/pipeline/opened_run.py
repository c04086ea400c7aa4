"""A run folder as Python objects, each read at its first use."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from jaxqat.integer._execute.executor import Executor, make_executor
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import restore_quantized
from jaxqat.pipeline.results import Results
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import Model
from jaxqat.quant import QuantizedModule


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run that `jaxqat train` made (`jaxqat.load_run`).

    `network` and `predict` need the integer network only. `model` and `variables` are restored from
    a checkpoint, which needs the run's data, for its shape and its normalization.

    Attributes:
        folder: Run folder.
        stage: 'qat' or 'ptq'.
        experiment: Its config.
    """

    folder: Path
    stage: str
    experiment: Experiment

    @classmethod
    def open(cls, folder: Path, stage: str) -> "Run":
        """Return the run in a folder.

        Raises:
            RunFolderError: The folder is no run folder.
        """
        return cls(folder, stage, RunFolder(folder).load_config())

    @functools.cached_property
    def results(self) -> Results:
        """The content of results.json."""
        return RunFolder(self.folder).read_results()

    @functools.cached_property
    def network(self) -> IntegerGraph:
        """The integer network, as `jaxqat.convert` returned it."""
        return load_network(RunFolder(self.folder), self.stage)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        labels: Any = self.network.metadata["labels"]
        return tuple(labels)

    @functools.cached_property
    def executor(self) -> Executor:
        """The integer network, compiled for the present device."""
        return make_executor(self.network)

    def predict(self, images: Any) -> jax.Array:
        """Return the logits of the integer network.

        Args:
            images: uint8 images, or float32 images normalized as in training: (batch, height,
                width, channels).
        """
        return self.executor(images)

    @property
    def model(self) -> QuantizedModule:
        """The quantized model, which takes normalized images."""
        return self._restored[0].quantized

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the quantized model: parameters, batch statistics, ranges."""
        return self._restored[1].tree()

    def normalize(self, images: Any) -> jax.Array:
        """Return the model's input for uint8 images."""
        return self._restored[0].normalize(images)

    @functools.cached_property
    def _restored(self) -> tuple[Networks, Model]:
        dataset = load_dataset(self.experiment.data)
        with matmul_precision(self.experiment):
            return restore_quantized(RunFolder(self.folder), self.experiment, dataset, self.stage)
