"""Make the entries of results.json from a run's networks, metrics and environment."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxqat.integer._compare import Verification
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset
from jaxqat.pipeline.evaluation import Measured
from jaxqat.pipeline.machine import processor
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.report import choose_samples, write_samples
from jaxqat.pipeline.results import (
    Environment,
    LayerResult,
    Origin,
    Results,
    RunInfo,
    SizeBytes,
    Speed,
    StageResult,
    TensorDifferences,
    VerificationResult,
)
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import Model
from jaxqat.quant import LayerInfo, Recipe
from jaxqat.quant._models.state import flat_state

FLOAT32_BYTES = 4


def describe_run(experiment: Experiment, dataset: Dataset, command: str | None) -> RunInfo:
    """Return what identifies a run: name, seed, config, data, environment."""
    return RunInfo(
        name=experiment.name,
        seed=experiment.seed,
        precision=experiment.precision,
        config_hash=configs.config_hash(experiment),
        data=dataset.fingerprint,
        environment=environment(),
        command=command,
    )


def environment() -> Environment:
    """Return the versions of the packages, the device and the date."""
    device, version = jax.devices()[0], importlib.metadata.version
    return Environment(
        python=platform.python_version(),
        jax=version("jax"),
        jaxlib=version("jaxlib"),
        flax=version("flax"),
        optax=version("optax"),
        aqtp=version("aqtp"),
        orbax=version("orbax-checkpoint"),
        numpy=version("numpy"),
        device=device.device_kind,
        platform=device.platform,
        devices=jax.device_count(),
        cpu_count=os.cpu_count(),
        processor=processor(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def float_results(
    networks: Networks, folder: RunFolder, model: Model, measured: Measured, command: str | None
) -> Results:
    """Return the results after the FP32 stage; later networks are added to them.

    Args:
        networks: Networks of the experiment.
        folder: The run folder, for its config and its metrics.
        model: The trained or calibrated quantized network, for the table of layers.
        measured: Scores and speed of the FP32 network.
        command: The command line.
    """
    info = describe_run(folder.load_config(), networks.dataset, command)
    stage, speed = stage_result(folder, "fp32", measured)
    layers = networks.describe()
    parameters = count_parameters(model.params)
    ranges = flat_state(model.collections)
    return Results(
        **{field.name: getattr(info, field.name) for field in dataclasses.fields(info)},
        fp32=stage,
        parameters=parameters,
        macs=sum(layer.macs for layer in layers),
        size_bytes=SizeBytes(fp32=FLOAT32_BYTES * parameters),
        layers=tuple(_layer_result(layer, model.params, ranges) for layer in layers),
        speed={"fp32": speed},
    )


def count_parameters(params: Any) -> int:
    """Return the number of elements in a tree of arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def _layer_result(layer: LayerInfo, params: Any, ranges: Any) -> LayerResult:
    weight = params
    for name in layer.weight_path:
        weight = weight[name]
    weight = np.asarray(weight)
    low, high = layer.covered(ranges) or (None, None)
    return LayerResult(
        path=layer.path,
        kind=layer.kind,
        weight_shape=tuple(layer.weight_shape),
        weight_bits=layer.weight_bits,
        act_bits=layer.act_bits,
        macs=layer.macs,
        weight_min=float(weight.min()),
        weight_max=float(weight.max()),
        act_min=low,
        act_max=high,
        float_reason=layer.float_reason,
    )


def stage_result(
    folder: RunFolder, stage: str, measured: Measured, recipe: Recipe | None = None
) -> tuple[StageResult, Speed]:
    """Return the result and the speed of a trained stage.

    Args:
        folder: The run folder, for the stage's lines of metrics.jsonl.
        stage: 'fp32' or 'qat'.
        measured: Scores and speed on the test split.
        recipe: The recipe of a quantized network.
    """
    records = [r for r in folder.read_metrics() if r["stage"] == stage]
    origin = folder.read_origin() if stage == "fp32" else None
    result = StageResult(
        test=measured.scores,
        train_seconds=sum(r["seconds"] for r in records),
        epochs=len(records),
        bits=None if recipe is None else bits_name(recipe),
        from_run=None if origin is None else Origin(**origin),
    )
    images_per_s = float(np.median([r["images_per_s"] for r in records]))
    return result, Speed(
        evaluate_images_per_s=measured.images_per_s, train_images_per_s=images_per_s
    )


def bits_name(recipe: Recipe) -> str:
    """Return a recipe's bits of weights and activations, such as 'W4A8', without its rules."""
    weights, acts = (32 if b is None else b for b in (recipe.weight_bits, recipe.act_bits))
    return f"W{weights}A{acts}"


def verification_result(found: Verification) -> VerificationResult:
    """Return a comparison in the form of results.json, with its totals."""
    tensors = tuple(TensorDifferences(**vars(tensor)) for tensor in found.tensors)
    names = {field.name for field in dataclasses.fields(VerificationResult)} - {"tensors"}
    return VerificationResult(tensors=tensors, **{name: getattr(found, name) for name in names})


def write_test_samples(
    folder: RunFolder, dataset: Dataset, results: Results, logits: Mapping[str, np.ndarray]
) -> None:
    """Save the test images that the report shows, with what the networks say.

    Args:
        folder: The run folder.
        dataset: The data.
        results: The results, for the names of the networks.
        logits: Logits of the test images by the key of each network; the first and the last one,
            in float and as deployed, are shown.
    """
    names = {network.key: network.name for network in results.tested()}
    first, *_, last = logits
    by_name = {names[key]: logits[key] for key in (first, last)}
    test = dataset.test
    write_samples(
        folder.path, choose_samples(test.images, test.labels, dataset.class_names, by_name)
    )
