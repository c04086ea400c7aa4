"""Made-up run folders."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from pipeline.report.made_up import CIFAR10, ENVIRONMENT, deploy, layers, records, scores

from jaxqat.pipeline import results as typed
from jaxqat.pipeline.report import ReportError, choose_samples, write_samples
from jaxqat.pipeline.results import Results, SizeBytes, Speed, StageResult


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Function that writes a run folder; by default, a run like the paper's."""

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
        test = scores(class_names, 0.95, seed=1)
        results = Results(
            name=name,
            seed=3,
            precision="float32",
            config_hash="0f3c9a7e21b4",
            data={"name": data, "description": "60,000 colour images of 10 classes."},
            environment=ENVIRONMENT,
            command="jaxqat train --config configs/cifar10_resnet18.yaml --workdir runs/a",
            fp32=StageResult(test=test, epochs=fp32_epochs, train_seconds=3310.0),
            parameters=11_173_962,
            macs=555_422_720,
            size_bytes=SizeBytes(fp32=44_695_848),
            layers=layers(),
            speed={"fp32": Speed(evaluate_images_per_s=5210.0, train_images_per_s=1520.4)},
        )
        lines = list(records("fp32", fp32_epochs, validation=validation))
        if qat_epochs:
            test = scores(class_names, 0.945, seed=2)
            qat = StageResult(test=test, epochs=qat_epochs, train_seconds=1210.0, bits="W8A8")
            speed = Speed(evaluate_images_per_s=3890.0, train_images_per_s=940.2)
            results = results.with_network("qat", qat, speed)
            frozen = max(1, qat_epochs // 5)
            lines += records("qat", qat_epochs, frozen=frozen, validation=validation)
        if deployed:
            results = deploy(results, test)
        typed.write(workdir / "results.json", results, error=ReportError)
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, size=(10, 8, 8, channels), dtype=np.uint8)
        labels = np.arange(10) % len(class_names)
        logits = {
            "FP32": 2.0 * np.eye(len(class_names))[labels],
            "QAT W8A8, integer": 3.0 * np.eye(len(class_names))[(labels + (labels == 1)) % 4],
        }
        write_samples(workdir, choose_samples(images, labels, class_names, logits))
        return workdir

    return write
