"""Made-up results with the shape and the numbers of real ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxqat.analysis.result import Effect, LayerAnalysis, Sensitivity, TensorAnalysis
from jaxqat.pipeline.measurements import Comparison, Evaluation, RunAnalysis
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.results import (
    Environment,
    IntegerResult,
    LayerResult,
    Results,
    Scores,
    SizeBytes,
    Speed,
    TensorDifferences,
    VerificationResult,
)

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]


def scores(class_names: Sequence[str], accuracy: float, *, seed: int, per_class: int = 100):
    """Return scores of a made-up classifier that confuses neighbouring classes."""
    rng = np.random.default_rng(seed)
    k = len(class_names)
    labels = np.repeat(np.arange(k), per_class)
    wrong = rng.random(labels.size) > accuracy
    predicted = (labels + wrong * rng.geometric(0.6, labels.size)) % k
    logits = 4.0 * np.eye(k)[predicted] + rng.normal(size=(labels.size, k)) * 0.1
    return classification_metrics(labels, logits, class_names)


def records(stage: str, epochs: int, *, frozen: int = 0, validation: bool = True):
    """Return lines of metrics.jsonl with curves like those of training."""
    rng = np.random.default_rng(len(stage) + epochs)
    start = 0.4 if stage == "fp32" else 0.9
    for epoch in range(1, epochs + 1):
        accuracy = start + (0.96 - start) * (1 - np.exp(-4 * epoch / epochs))
        noise = rng.normal(scale=0.004, size=2)
        yield {
            "stage": stage,
            "epoch": epoch,
            "step": epoch * 390,
            "learning_rate": 0.1 / epoch,
            "loss": float(2.3 * (1 - accuracy) + noise[0]),
            "accuracy": float(accuracy + noise[0]),
            "validation_loss": float(2.4 * (1 - accuracy) + 0.06) if validation else None,
            "validation_accuracy": float(accuracy - 0.02 + noise[1]) if validation else None,
            "images_per_s": 1520.0,
            "seconds": 33.1,
            "frozen": epoch > epochs - frozen,
        }


def layer(path: str = "a", **changes: Any) -> LayerResult:
    """A quantized convolution; `changes` sets other fields."""
    fields: dict[str, Any] = {
        "kind": "conv",
        "weight_shape": (3, 3, 64, 64),
        "weight_bits": 8,
        "act_bits": 8,
        "macs": 37_748_736,
        "weight_min": -1.0,
        "weight_max": 1.0,
        "act_min": 0.0,
        "act_max": 6.0,
        "float_reason": None,
    }
    return LayerResult(path=path, **fields | changes)


def layers() -> tuple[LayerResult, ...]:
    """The 21 layers of ResNet-18, the last one left in float."""
    rng = np.random.default_rng(1)
    blocks = [(stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)]
    paths = ["stem_conv"]
    for stage, block in blocks:
        names = ["conv1", "conv2"] + (["shortcut_conv"] if stage > 1 and block == 0 else [])
        paths += [f"stage{stage}/block{block}/{name}" for name in names]
    rows = [
        layer(
            path,
            weight_min=-float(rng.uniform(0.2, 1.2)),
            weight_max=float(rng.uniform(0.2, 1.2)),
            act_min=-2.1 if path == "stem_conv" else 0.0,
            act_max=float(rng.uniform(1, 7)),
        )
        for path in paths
    ]
    in_float = {"weight_bits": None, "act_bits": None, "act_min": None, "act_max": None}
    reason = "the recipe's rule 'head' leaves it in float"
    shape = (512, 10)
    head = layer("head", kind="dense", weight_shape=shape, float_reason=reason, **in_float)
    return (*rows, head)


def tensor(name: str, sqnr_db: float | None, differing: int = 0) -> TensorDifferences:
    """Eight million codes of a tensor, of which some differ by one."""
    return TensorDifferences(
        name=name,
        codes=8_000_000,
        differing=differing,
        largest=int(differing > 0),
        sqnr_db=sqnr_db,
    )


def verification() -> VerificationResult:
    """The comparison of an integer network of `layers`: three codes differ."""
    tensors = tuple(
        tensor(f"{layer.path}/input", 40.0 - i if i else None, 3 * (i == 4))
        for i, layer in enumerate(layers())
    )
    return VerificationResult(
        tensors=tensors,
        images=10_000,
        codes=168_000_000,
        differing=3,
        largest=1,
        top1_flips=0,
        top1_flips_fp32=12,
        logits_only=False,
        failures=(),
        results=100_000,
        differing_results=0,
        largest_result_difference=0.0,
        nan_inputs=0,
        unexplained_results=0,
    )


def deploy(results: Results, test: Scores) -> Results:
    """Add the integer network of `layers`: some of its codes differ."""
    integer = IntegerResult(test=test, requantization="float", step=11_700, bits="W8A8")
    speed = Speed(evaluate_images_per_s=9120.0)
    size = SizeBytes(fp32=44_695_848, integer=11_248_816)
    return results.with_network("integer", integer, speed, verify=verification(), size_bytes=size)


ENVIRONMENT = Environment(
    python="3.11.7",
    jax="0.10.2",
    jaxlib="0.10.2",
    flax="0.12.8",
    optax="0.2.8",
    aqtp="0.9.0",
    orbax="0.12.8",
    numpy="2.4.6",
    device="NVIDIA H200",
    platform="gpu",
    devices=1,
    cpu_count=2,
    processor="AMD EPYC (x86_64)",
    date="2026-11-23T11:49:31+00:00",
)

INFO: dict[str, Any] = {
    "name": "made up",
    "seed": 3,
    "precision": "float32",
    "config_hash": "0f3c9a7e21b4",
    "data": {"name": "cifar10", "counts": {"train": 50_000}, "image_shape": [32, 32, 3]},
    "environment": ENVIRONMENT,
}


def evaluation() -> Evaluation:
    """An integer network on the test split."""
    metrics = scores(CIFAR10, 0.9, seed=0)
    measured: dict[str, Any] = {"evaluate_images_per_s": 9120.0, "metrics": metrics}
    return Evaluation(**INFO, stage="integer", split="test", step=12, **measured)


def comparison() -> Comparison:
    """What `verify` writes."""
    return Comparison(**INFO, **vars(verification()), of="the integer network and ONNX Runtime")


def effect(sqnr_db: float | None, accuracy: float | None = 0.5) -> Effect:
    """A result of which nine of ten classes are the float network's."""
    return Effect(sqnr_db, 0.9, accuracy)


def analysis(layers: int = 8) -> RunAnalysis:
    """An analysis of layers of which the last is the most sensitive, and two read one tensor."""
    paths = [f"block{i}/conv" for i in range(layers)]
    inputs = [f"block{max(i, 1)}/conv/input" for i in range(layers)]
    return RunAnalysis(
        **INFO,
        stage="qat",
        split="test",
        step=12,
        recipe={"weight_bits": 8, "rules": [{"path": "head", "act_bits": None}]},
        calibration_batches=4,
        examples=1234,
        real=effect(None),
        quantized=effect(20.0, 0.4375),
        layers=tuple(
            LayerAnalysis(path, "conv", 8, 8, name, None, -3.25)
            for path, name in zip(paths, inputs, strict=True)
        ),
        tensors=tuple(observed(name) for name in dict.fromkeys(inputs)),
        sensitivity=tuple(
            Sensitivity(path, effect(30.0 - i), effect(20.0 + i))
            for i, path in reversed(list(enumerate(paths)))
        ),
    )


def observed(name: str) -> TensorAnalysis:
    """A tensor of which 3 of 2,019 values are clipped."""
    return TensorAnalysis(
        name=name,
        low=-0.5,
        high=1.5,
        smallest=-0.5,
        largest=1.55,
        values=2019,
        clipped=3 / 2019,
        sqnr_db=40.0,
        edges=tuple(np.linspace(-1.0, 2.0, 97).tolist()),
        counts=(*[0] * 16, *range(64), 3, *[0] * 15),
    )
