"""Benchmark a training step: time and memory in FP32, TF32, bfloat16 and QAT."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.bench.checks import BenchmarkError
from jaxqat.bench.engines import is_installed, platform
from jaxqat.bench.timing import Call, add_ratios, alternate, summarize
from jaxqat.bench.torch_training import torch_has, torch_steps
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset, Split, normalize
from jaxqat.pipeline.networks import Networks, matmul_precision, stage_key
from jaxqat.pipeline.training import (
    DEFAULT,
    FAST,
    Compilation,
    Data,
    TrainState,
    init_state,
    make_optimizer,
    make_step,
)
from jaxqat.pipeline.training.step import make_dispatch
from jaxqat.quant import QuantizedModule
from jaxqat.quant._interpret import Memory
from jaxqat.quant._models.training_step import is_supported

# As in training, a CPU runs one step per call. On an accelerator, such calls would leave it idle.
STEPS_PER_CALL = {"cpu": 1}
ACCELERATOR_STEPS_PER_CALL = 10
STEPS_PER_EPOCH = 4

# The updates of the first step, as vectors, have the same direction except for rounding. Unrelated
# directions of millions of parameters have a cosine near 0.
LEAST_COSINE = 0.5


@dataclasses.dataclass(frozen=True)
class Variant:
    """A stage and precision to train in.

    Attributes:
        key: Name in JSON.
        label: Displayed name.
        stage: 'fp32' or 'qat'.
        precision: `Experiment.precision`.
        compilation: How the step is compiled.
        memory: What it keeps of quantized tensors (`qat.memory`).
    """

    key: str
    label: str
    stage: str
    precision: str
    compilation: Compilation = DEFAULT
    memory: Memory = "values"


FP32 = Variant("fp32", "FP32", "fp32", "float32")
TF32 = Variant("tf32", "TF32", "fp32", "tf32")
BF16 = Variant("bf16", "bf16", "fp32", "bfloat16")
QAT = Variant("qat", "QAT", "qat", "float32")
QAT_TF32 = Variant("qat_tf32", "QAT, else TF32", "qat", "tf32")
QAT_BF16 = Variant("qat_bf16", "QAT, else bf16", "qat", "bfloat16")
QAT_CODES = Variant("qat_codes", "QAT, keeping codes", "qat", "float32", memory="codes")


def _fast(variant: Variant) -> Variant:
    """Return a variant in the form that is fast on a CPU."""
    key, label = f"{variant.key}_{FAST.name}", f"{variant.label}, {FAST.name}"
    return dataclasses.replace(variant, key=key, label=label, compilation=FAST)


VARIANTS = {
    "cpu": (FP32, _fast(FP32), BF16, _fast(BF16), QAT, _fast(QAT)),
    "cuda": (FP32, TF32, BF16, QAT, QAT_TF32, QAT_BF16, QAT_CODES),
    "tpu": (FP32, BF16, QAT, QAT_BF16, QAT_CODES),
}


def benchmark_training(
    experiment: Experiment,
    *,
    image_shape: tuple[int, ...],
    classes: int,
    batch_size: int | None = None,
    rounds: int = 10,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time a training step in all precisions of the device.

    Args:
        experiment: The network, the recipe and the optimizer; its data is not used.
        image_shape: Shape of one image.
        classes: Number of classes.
        batch_size: Images per training step; None for the experiment's.
        rounds: Number of measurements of each precision.
        log: Receives progress messages.

    Returns:
        The network and a table row for each precision, as JSON values.

    Raises:
        BenchmarkError: If an update is not finite, is zero, or differs in direction from FP32's.
    """
    device = platform()
    batch = batch_size or experiment.fp32.batch_size
    length = STEPS_PER_CALL.get(device, ACCELERATOR_STEPS_PER_CALL)
    dataset = random_dataset(image_shape, classes, batch * STEPS_PER_EPOCH)
    rows, calls, steps, first = [], {}, {}, {}
    variants = VARIANTS.get(device, VARIANTS["cpu"])
    for variant in (v for v in variants if is_supported() or v.compilation is DEFAULT):
        log(f"compiling {variant.label}")
        qat = dataclasses.replace(experiment.qat, memory=variant.memory)
        settings = dataclasses.replace(experiment, precision=variant.precision, qat=qat)
        with matmul_precision(settings):
            networks = Networks.build(settings, dataset)
            trainer = Trainer(networks, variant.stage, batch, length, variant.compilation)
        first[variant.key] = trainer.first_update()
        check_update(variant.label, first[variant.key], first[FP32.key])
        rows.append({"key": variant.key, "label": variant.label, **trainer.memory()})
        rows[-1]["cosine_to_fp32"] = cosine(first[variant.key], first[FP32.key])
        calls[variant.key] = trainer.call()
        steps[variant.key] = length
    if device == "cpu":
        for key, (label, call) in _by_torch(experiment, dataset, batch, log).items():
            rows.append({"key": key, "label": label, "temporary_bytes": None})
            rows[-1] |= {"argument_bytes": None, "cosine_to_fp32": None}
            calls[key], steps[key] = call, 1
    log(f"{rounds} rounds of {len(calls)} steps")
    seconds = alternate(calls, rounds=rounds)
    for row in rows:
        row |= summarize([s / steps[row["key"]] for s in seconds[row["key"]]], batch)
    add_ratios(rows, {"ratio_to_fp32": FP32.key})
    return {
        "network": {"name": experiment.name, **dataclasses.asdict(experiment.model)},
        "recipe": dataclasses.asdict(experiment.quant),
        "image_shape": list(image_shape),
        "batch_size": batch,
        "steps_per_call": length,
        "precisions": rows,
        "notes": notes(rows),
    }


def _by_torch(
    experiment: Experiment, dataset: Dataset, batch: int, log: Callable[[str], None]
) -> dict[str, tuple[str, Call]]:
    """Return PyTorch's training steps of the same network, if it is installed and has them."""
    if not is_installed("torch") or not torch_has(experiment.model):
        return {}
    log("building PyTorch")
    images = np.asarray(
        normalize(jnp.asarray(dataset.train.images[:batch]), dataset.mean, dataset.std)
    )
    return torch_steps(experiment.model, dataset.num_classes, images, dataset.train.labels[:batch])


class Trainer:
    """A compiled training step and its state.

    Attributes:
        networks: The networks, the experiment and the data.
        compile_seconds: Time to trace and compile the training steps.
    """

    def __init__(
        self,
        networks: Networks,
        stage: str,
        batch: int,
        length: int,
        compilation: Compilation = DEFAULT,
    ):
        """Compile `length` training steps of a stage, with the settings of the FP32 stage.

        Products have the precision that is set at this call (`matmul_precision`).
        """
        self.networks, self._stage, self._compilation = networks, stage, compilation
        dataset, config = networks.dataset, networks.experiment.fp32
        # The same optimizer for both stages; without a warm-up, as its first update is zero.
        settings = dataclasses.replace(config.optimizer, warmup_epochs=0.0)
        optimizer = make_optimizer(settings, total_steps=10**6, steps_per_epoch=STEPS_PER_EPOCH)
        step = make_step(
            forward=networks.forward(stage),
            prepare=networks.prepare,
            optimizer=optimizer,
            batch_size=batch,
            steps_per_epoch=STEPS_PER_EPOCH,
            label_smoothing=config.label_smoothing,
        )
        self._data = Data(*jax.device_put((dataset.train.images, dataset.train.labels)))
        self._order = jnp.arange(len(dataset.train), dtype=jnp.int32)
        # All trainers see the same augmented images: their first updates are compared.
        self._key = stage_key(networks.experiment.seed, "fp32")
        self._state = self._init(optimizer)
        start = time.perf_counter()
        self._compiled = self._compile(step, length)
        self.compile_seconds = time.perf_counter() - start
        # First updates are compared, as rounding makes longer trainings diverge.
        self._one_step = self._compiled if length == 1 else self._compile(step, 1)

    @property
    def params(self) -> Any:
        """The parameters."""
        return self._state.params

    def _compile(self, step: Any, length: int) -> Any:
        arguments = (self._state, self._data, self._order, self._key)
        return self._compilation.compile(make_dispatch(step, length), *arguments)

    def _init(self, optimizer: Any) -> TrainState:
        params, collections = self.networks.init()
        module = self.networks.modules[self._stage]
        if isinstance(module, QuantizedModule):
            variables = {"params": params, **collections}
            image = self.networks.one_image()
            # Uncalibrated ranges become those of the first batch.
            collections = module.init_quant(variables, image, train=False)
            del collections["params"]
        return jax.tree.map(jnp.array, init_state(params, collections, optimizer))

    def first_update(self) -> list[np.ndarray]:
        """Run one training step; return its change of the parameters."""
        before = jax.tree.map(np.array, jax.tree.leaves(self._state.params))
        self._run(self._one_step)
        after = jax.tree.leaves(self._state.params)
        return [np.asarray(b) - a for a, b in zip(before, after, strict=True)]

    def memory(self) -> dict[str, int | None]:
        """Return the memory of a call in bytes, as the compiler reports it."""
        analysis = self._compiled.memory_analysis()
        return {
            "temporary_bytes": None if analysis is None else analysis.temp_size_in_bytes,
            "argument_bytes": None if analysis is None else analysis.argument_size_in_bytes,
        }

    def call(self) -> Call:
        """Return a call, already warm, that runs the compiled training steps."""
        self._run(self._compiled)
        return lambda: self._run(self._compiled)

    def _run(self, program: Any) -> None:
        # The state's buffers are donated, as in training.
        arguments = (self._state, self._data, self._order, self._key)
        self._state, loss = program(*arguments)
        jax.block_until_ready(loss)


def random_dataset(image_shape: tuple[int, ...], classes: int, count: int) -> Dataset:
    """Return random images of random classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *image_shape), np.uint8)
    split = Split(images, rng.integers(0, classes, count, np.int32))
    channels = image_shape[-1]
    return Dataset(
        name="noise",
        train=split,
        validation=None,
        test=split,
        class_names=tuple(map(str, range(classes))),
        mean=(0.5,) * channels,
        std=(0.29,) * channels,
        fingerprint={},
    )


def check_update(label: str, update: list[np.ndarray], reference: list[np.ndarray]) -> None:
    """Check that an update is finite and has about the direction of FP32's.

    Raises:
        BenchmarkError: If not; also if the update is zero.
    """
    if not all(np.isfinite(change).all() for change in update):
        raise BenchmarkError(f"{label}: the update of the first training step is not finite.")
    found = cosine(update, reference)
    if not found >= LEAST_COSINE:
        raise BenchmarkError(
            f"{label}: the update of the first training step differs from that of FP32: the cosine "
            f"of the two is {found:.3f}, expected at least {LEAST_COSINE}. Times of wrong steps "
            "are not reported."
        )


def cosine(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Return the cosine of two updates, each as one vector; 0 if one is zero."""
    a, b = (np.concatenate([x.ravel() for x in xs]).astype(np.float64) for xs in (first, second))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size else 0.0


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each float variant, compiled alike, that is faster than a QAT one."""
    found = []
    for row in (row for row in rows if row["key"].startswith("qat")):
        for other in rows:
            kind = other["key"].partition("_")[0]
            if kind in ("qat", "torch") or _is_fast(other["key"]) != _is_fast(row["key"]):
                continue
            ratio = other["median_s"] / row["median_s"]
            if ratio < 1:
                found.append(
                    f"A step of {row['label']} is slower than one of {other['label']} here: "
                    f"{ratio:.2f} times its speed."
                )
    return found


def _is_fast(key: str) -> bool:
    return key.endswith(f"_{FAST.name}")
