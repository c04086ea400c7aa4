"""Made-up run folders with the shape and the numbers of real ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.report import write_samples

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]


def scores(class_names: Sequence[str], accuracy: float, *, seed: int, per_class: int = 100):
    """Metrics of a made-up classifier that errs towards the neighbouring classes."""
    rng = np.random.default_rng(seed)
    k = len(class_names)
    labels = np.repeat(np.arange(k), per_class)
    wrong = rng.random(labels.size) > accuracy
    predicted = (labels + wrong * rng.geometric(0.6, labels.size)) % k
    logits = 4.0 * np.eye(k)[predicted] + rng.normal(size=(labels.size, k)) * 0.1
    return classification_metrics(labels, logits, class_names)


def records(stage: str, epochs: int, *, frozen: int = 0, validation: bool = True):
    """Lines of metrics.jsonl with curves that rise and fall as training does."""
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


def layers() -> list[dict[str, Any]]:
    """The 21 layers of ResNet-18, the last one left in float."""
    rng = np.random.default_rng(1)
    blocks = [(stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)]
    paths = ["stem_conv"]
    for stage, block in blocks:
        names = ["conv1", "conv2"] + (["shortcut_conv"] if stage > 1 and block == 0 else [])
        paths += [f"stage{stage}/block{block}/{name}" for name in names]
    rows = [
        {
            "path": path,
            "kind": "conv",
            "weight_shape": [3, 3, 64, 64],
            "weight_bits": 8,
            "act_bits": 8,
            "macs": 37_748_736,
            "weight_min": -float(rng.uniform(0.2, 1.2)),
            "weight_max": float(rng.uniform(0.2, 1.2)),
            "act_min": -2.1 if path == "stem_conv" else 0.0,
            "act_max": float(rng.uniform(1, 7)),
            "float_reason": None,
        }
        for path in paths
    ]
    head = {**rows[-1], "path": "head", "kind": "dense", "weight_shape": [512, 10]}
    head |= {"weight_bits": None, "act_bits": None, "act_min": None, "act_max": None}
    return [*rows, head | {"float_reason": "the recipe's rule 'head' leaves it in float"}]


def deploy(results: dict[str, Any], class_names: Sequence[str]) -> None:
    """Adds the integer network of `layers`: some of its codes differ."""
    results["integer"] = {"test": scores(class_names, 0.945, seed=2), "requantization": "float"}
    results["speed"]["integer"] = {"evaluate_images_per_s": 9120.0}
    tensors = [
        {
            "name": f"{layer['path']}/input",
            "codes": 8_000_000,
            "differing": 3 * (i == 4),
            "largest": int(i == 4),
            "sqnr_db": 40.0 - i if i else None,
        }
        for i, layer in enumerate(layers())
    ]
    results["verify"] = {
        "tensors": tensors,
        "images": 10_000,
        "codes": 168_000_000,
        "differing": 3,
        "largest": 1,
        "top1_flips": 0,
        "top1_flips_fp32": 12,
        "failures": [],
    }


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder; what the test does not name is the paper's run."""

    def write(
        *,
        name: str = "cifar10_resnet18",
        data: str = "cifar10",
        class_names: Sequence[str] = CIFAR10,
        width: int = 64,
        fp32_epochs: int = 100,
        qat_epochs: int = 30,
        validation: bool = True,
        channels: int = 3,
        deployed: bool = False,
    ) -> Path:
        workdir = tmp_path / "run"
        workdir.mkdir()
        model = {"depth": 18, "width": width, "stem": "cifar"}
        config = {"name": name, "model": model, "data": {"name": data, "validation_size": 0}}
        (workdir / "config.yaml").write_text(yaml.safe_dump(config))
        results: dict[str, Any] = {
            "name": name,
            "seed": 3,
            "precision": "float32",
            "size_bytes": {"fp32": 44_695_848, "integer": 11_248_816},
            "parameters": 11_173_962,
            "macs": 555_422_720,
            "speed": {"fp32": {"train_images_per_s": 1520.4, "evaluate_images_per_s": 5210.0}},
            "layers": layers(),
            "data": {"name": data, "description": "60,000 colour images of 10 classes."},
            "environment": {"python": "3.11.7", "jax": "0.10.2", "device": "NVIDIA H200"},
            "config_hash": "0f3c9a7e21b4",
            "command": "jaxqat train --config configs/cifar10_resnet18.yaml --workdir runs/a",
        }
        results["fp32"] = {
            "test": scores(class_names, 0.95, seed=1),
            "epochs": fp32_epochs,
            "train_seconds": 3310.0,
        }
        lines = list(records("fp32", fp32_epochs, validation=validation))
        if qat_epochs:
            results["qat"] = {
                "test": scores(class_names, 0.945, seed=2),
                "epochs": qat_epochs,
                "train_seconds": 1210.0,
            }
            results["speed"]["qat"] = {"train_images_per_s": 940.2, "evaluate_images_per_s": 3890.0}
            frozen = max(1, qat_epochs // 5)
            lines += records("qat", qat_epochs, frozen=frozen, validation=validation)
        if deployed:
            deploy(results, class_names)
        (workdir / "results.json").write_text(json.dumps(results))
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, size=(10, 8, 8, channels), dtype=np.uint8)
        write_samples(workdir, images, np.arange(10) % len(class_names), class_names)
        return workdir

    return write
