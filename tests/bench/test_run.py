"""The benchmark of a run's network, on its images."""

import json

import pytest
import tiny_run

from jaxqat.commands.benchmark import benchmark

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished = tiny_run.console, tiny_run.finished


def test_a_runs_network_is_measured_on_its_images(finished, console):
    result = benchmark(finished, batch_sizes=[1, 2], rounds=1, console=console)
    assert result["run"] == str(finished)
    assert result["images"] == "test images of the run"
    assert result["network"]["name"] == "tiny"
    assert [batch["batch_size"] for batch in result["batches"]] == [1, 2]
    assert "tiny: batch 1" in console.file.getvalue()
    assert "tiny: batch 2" in console.file.getvalue()


def test_training_of_a_runs_network_is_measured(finished, small_network, console, tmp_path):
    path = tmp_path / "speed.json"
    benchmark(finished, what="train", batch_sizes=[8], rounds=1, json=path, console=console)
    result = json.loads(path.read_text())
    assert result["what"] == "train"
    assert result["batch_size"] == 8
    assert result["image_shape"] == [8, 8, 1]
    keys = [row["key"] for row in result["precisions"] if not row["key"].startswith("torch")]
    assert keys == ["fp32", "fp32_fast", "bf16", "bf16_fast", "qat", "qat_fast"]
    assert "QAT" in console.file.getvalue()
