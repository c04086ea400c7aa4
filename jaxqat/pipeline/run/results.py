"""results.json: what a run achieved, on what, with which software."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset
from jaxqat.pipeline.metrics import weight_bytes
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.report import write_samples
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.quant.models.function import flatten

SAMPLE_COUNT = 32
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "aqtp", "orbax-checkpoint", "numpy")


def describe_run(experiment: Experiment, dataset: Dataset, command: str | None) -> dict[str, Any]:
    """What is known before any number is: name, seed, data, environment."""
    return {
        "name": experiment.name,
        "seed": experiment.seed,
        "precision": experiment.precision,
        "command": command,
        "config_hash": configs.config_hash(experiment),
        "data": dataset.fingerprint,
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions, device and date."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{_key(name): importlib.metadata.version(name) for name in _PACKAGES},
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "processor": processor(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Model and architecture of the host's processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.processor() or 'unknown'])[0]} ({platform.machine()})"


def _key(package: str) -> str:
    return "orbax" if package == "orbax-checkpoint" else package


def describe_network(
    networks: Networks, params: Any, ranges: Any, graph: IntegerGraph | None
) -> dict[str, Any]:
    """Size, arithmetic and layers of the quantized network.

    The bytes of FP32 are those of all parameters, four each; the bytes of the integer network are
    those of its arrays as they are saved: a byte for each weight (two codes of 3 or 4 bits share
    one, or four of 2 bits), an int32 bias and a float32 multiplier for each output channel.

    Args:
        networks: Which.
        params: Its parameters.
        ranges: Its activation ranges, the 'quant' collection.
        graph: Its integer network, if it has one.
    """
    layers = networks.describe()
    size = weight_bytes(params, {layer.path: layer.weight_bits for layer in layers})
    integer = {} if graph is None else {"integer": graph.size_bytes()}
    return {
        "size_bytes": {"fp32": size["fp32"], **integer},
        "parameters": size["parameters"],
        "macs": sum(layer.macs for layer in layers),
        "layers": [_describe_layer(layer, params, flatten(ranges)) for layer in layers],
    }


def _describe_layer(layer: Any, params: Any, ranges: Any) -> dict[str, Any]:
    weight = np.asarray(_at(params, layer.weight_path))
    low, high = layer.covered(ranges) or (None, None)
    return {
        "path": layer.path,
        "kind": layer.kind,
        "weight_shape": list(layer.weight_shape),
        "weight_bits": layer.weight_bits,
        "act_bits": layer.act_bits,
        "macs": layer.macs,
        "weight_min": float(weight.min()),
        "weight_max": float(weight.max()),
        "act_min": low,
        "act_max": high,
        "float_reason": layer.float_reason,
    }


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def describe_tests(
    measured: Mapping[str, tuple[dict[str, Any], float]], folder: RunFolder
) -> dict[str, Any]:
    """Scores on the test split, time and speed of the trained networks.

    Args:
        measured: Metrics and images/s of 'fp32' and, once it is trained, of 'qat'.
        folder: The run folder, for its metrics and for where its FP32 network came from.
    """
    results: dict[str, Any] = {}
    speed = {}
    records, origin = folder.read_metrics(), folder.read_origin()
    for name, (metrics, images_per_s) in measured.items():
        timing = stage_seconds(records, name)
        speed[name] = {
            "train_images_per_s": timing.pop("train_images_per_s"),
            "evaluate_images_per_s": images_per_s,
        }
        results[name] = {"test": metrics, **timing}
        if name == "fp32" and origin is not None:
            results[name]["from_run"] = origin
    return {**results, "speed": speed}


def stage_seconds(records: list[dict[str, Any]], stage: str) -> dict[str, Any]:
    """Time, epochs and training speed of a stage, from its lines of metrics.jsonl."""
    own = [r for r in records if r["stage"] == stage]
    return {
        "train_seconds": sum(r["seconds"] for r in own),
        "epochs": len(own),
        "train_images_per_s": float(np.median([r["images_per_s"] for r in own])),
    }


def write_test_samples(folder: RunFolder, dataset: Dataset) -> None:
    """Keep the test images that the report shows."""
    shown = dataset.test.take(np.arange(min(SAMPLE_COUNT, len(dataset.test))))
    write_samples(folder.path, shown.images, shown.labels, dataset.class_names)


def summary_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tested networks and their metrics, in the order in which they were made."""
    if "fp32" in results:
        yield "fp32", results["fp32"]["test"]
    if "ptq" in results:
        yield "ptq", results["ptq"]["test"]
    if "qat" in results:
        # Runs of before 'ptq' tested the calibrated network as QAT computes it.
        if "calibrated" in results["qat"] and "ptq" not in results:
            yield "qat, calibrated only", results["qat"]["calibrated"]["test"]
        yield "qat", results["qat"]["test"]
    if "test" in results.get("integer", {}):
        yield "integer", results["integer"]["test"]
