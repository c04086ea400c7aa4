"""The float and the quantized network of an experiment, as functions for training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import AugmentConfig, Dataset, augment, epoch_permutation, normalize
from jaxqat.pipeline.models import build_model, check_target, source_sha256
from jaxqat.pipeline.progress import Track
from jaxqat.pipeline.training import Collections, Forward
from jaxqat.quant import (
    BatchNormEstimate,
    LayerInfo,
    QuantizedModule,
    calibrate,
    estimate_batch_norm,
    quantize,
)

# Folded into a stage's random key. Other numbers would change the results of every seed.
STAGE_STREAMS = {"init": 0, "fp32": 1, "qat": 2}

_MATMUL_PRECISION = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "default"}


def matmul_precision(experiment: Experiment) -> AbstractContextManager:
    """Set the precision of float products for a block; JAX's default is not float32."""
    return jax.default_matmul_precision(_MATMUL_PRECISION[experiment.precision])


def stage_key(seed: int, stage: str) -> jax.Array:
    """Return the random key of a stage."""
    return jax.random.fold_in(jax.random.key(seed), STAGE_STREAMS[stage])


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
    """The networks of an experiment on its data.

    Attributes:
        experiment: The experiment.
        dataset: Its data.
        modules: Module of each stage, 'fp32' and 'qat', with the interface of Linen.
    """

    experiment: Experiment
    dataset: Dataset
    modules: dict[str, Any]

    @classmethod
    def build(cls, experiment: Experiment, dataset: Dataset) -> "Networks":
        """Return both networks; trace them, so that a rule that matches no layer raises here."""
        dtype = jnp.bfloat16 if experiment.precision == "bfloat16" else jnp.float32
        module = build_model(experiment.model, dataset.num_classes, dtype)
        quantized = quantize(module, experiment.quant, memory=experiment.qat.memory)
        networks = cls(experiment, dataset, {"fp32": module, "qat": quantized})
        if experiment.model.target is not None:
            check_target(experiment.model, module, networks.one_image(), dataset.num_classes)
        networks.describe()
        return networks

    @functools.cached_property
    def source(self) -> str | None:
        """SHA-256 of the file that defines a network of the user's own."""
        return source_sha256(self.experiment.model)

    @property
    def quantized(self) -> QuantizedModule:
        """The network of the QAT stage."""
        return self.modules["qat"]

    def init(self) -> tuple[Any, Collections]:
        """Return initial parameters and batch statistics."""
        key = stage_key(self.experiment.seed, "init")
        init = jax.jit(partial(self.modules["fp32"].init, train=False))
        lowered = init.lower(key, self.one_image())
        # It runs once: on a CPU, optimizing random number generation takes longer than running it.
        on_cpu = jax.default_backend() == "cpu"
        options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
        variables = dict(lowered.compile(compiler_options=options)(key, self.one_image()))
        return variables.pop("params"), variables

    def shapes(self, stage: str) -> tuple[Any, Collections]:
        """Return parameters and collections of a stage as shapes and dtypes."""

        def init(key):
            module, image = self.modules[stage], self.one_image()
            variables = dict(module.init(key, image, train=False))
            if isinstance(module, QuantizedModule):
                variables = module.init_quant(variables, image, train=False)
            return variables.pop("params"), variables

        return jax.eval_shape(init, jax.random.key(0))

    def describe(self) -> tuple[LayerInfo, ...]:
        """Return every product of the network and how it is quantized."""
        params, collections = self.shapes("fp32")
        variables = {"params": params, **collections}
        return self.quantized.layers(variables, self.one_image(), train=False)

    def forward(self, stage: str, *, frozen: bool = False) -> Forward:
        """Return the network in training mode, or with all its collections frozen."""
        module = self.modules[stage]

        def train(params, collections, images, key):
            # Linen takes this key for dropout, too, and for every other stream.
            logits, updates = module.apply(
                {"params": params, **collections},
                images,
                train=True,
                mutable=list(collections),
                rngs={"params": key},
            )
            return logits, {**collections, **updates}

        def infer(params, collections, images, key):
            del key
            return module.apply({"params": params, **collections}, images, train=False), collections

        return infer if frozen else train

    def normalize(self, images: jax.Array) -> jax.Array:
        """Return the networks' input for raw images."""
        return normalize(images, self.dataset.mean, self.dataset.std)

    @property
    def augmentation(self) -> AugmentConfig:
        """The changes to training images, chosen for the data where the config leaves it open."""
        height, width = self.dataset.image_shape[:2]
        return self.experiment.augment.of(self.experiment.data, height, width)

    def prepare(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Return the augmented input for raw training images."""
        chosen = self.augmentation
        assert chosen.crop_padding is not None and chosen.flip is not None
        images = augment(key, images, crop_padding=chosen.crop_padding, flip=chosen.flip)
        return self.normalize(images)

    def calibrate(
        self, params: Any, collections: Mapping[str, Any], *, track: Track = iter
    ) -> Collections:
        """Return the collections and, in addition, the float network's activation ranges.

        The ranges are observed on randomly chosen training images, without augmentation; `track`
        counts them.
        """
        images = self.dataset.train.images
        bound = calibrate(
            self.quantized,
            {"params": params, **collections},
            batches=(images[indices] for indices in track(self._calibration_batches())),
            preprocess=self.normalize,
            train=False,
        )
        return {name: value for name, value in bound.variables.items() if name != "params"}

    def batch_norm(
        self, params: Any, collections: Mapping[str, Any], *, track: Track = iter
    ) -> BatchNormEstimate | None:
        """Return the float network's batch statistics over augmented training images.

        They are the images that `calibrate` uses; `track` counts them. None for a network without
        batch norm.
        """
        if not jax.tree.leaves(collections.get("batch_stats")):
            return None
        images, key = self.dataset.train.images, stage_key(self.experiment.seed, "qat")
        batches = (
            (jax.random.fold_in(key, number), images[indices])
            for number, indices in enumerate(track(self._calibration_batches()))
        )
        return estimate_batch_norm(
            self.modules["fp32"],
            {"params": params, **collections},
            batches=batches,
            preprocess=self.prepare,
            train=True,
            rngs={"params": key},
        )

    @property
    def calibration_images(self) -> int:
        """Number of images for calibration."""
        return self._calibration_batches().size

    def _calibration_batches(self) -> np.ndarray:
        """Return indices of randomly chosen training images, (batches, images)."""
        config, size = self.experiment.qat, len(self.dataset.train)
        # Training counts epochs from 1, so only calibration uses the order of epoch 0.
        order = np.asarray(epoch_permutation(self.experiment.seed, 0, size))
        batches = min(config.calibration_batches, size // config.batch_size)
        return order[: batches * config.batch_size].reshape(batches, config.batch_size)

    def predictor(self, stage: str) -> Callable[[Any, jax.Array], jax.Array]:
        """Return the compiled function (variables, uint8 images) -> logits."""
        module = self.modules[stage]
        return jax.jit(
            lambda variables, images: module.apply(variables, self.normalize(images), train=False)
        )

    def one_image(self) -> jax.Array:
        """Return an input of the networks, for tracing."""
        return jnp.zeros((1, *self.dataset.image_shape), jnp.float32)
