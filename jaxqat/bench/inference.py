"""Inference of one network in several engines and precisions, from float32 images to logits."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxqat.bench import roofline
from jaxqat.bench.checks import (
    EXACT_LIMIT,
    QUANTIZED_LIMIT,
    Agreement,
    BenchmarkError,
    compare,
    float_limit,
    quantized_limit,
)
from jaxqat.bench.engines import Bind, Engine, Setup, engines_of, platform
from jaxqat.bench.networks import are_usable, make_images
from jaxqat.bench.timing import Call, add_ratios, alternate, summarize
from jaxqat.integer.graph import IntegerGraph

FLOAT, INTEGER, STATIC = "jax_fp32", "jax_integer", "ort_static"
BASELINES = {"ratio_to_jax_fp32": FLOAT, "ratio_to_ort_fp32": "ort_fp32"}
CALIBRATION_BATCHES, CALIBRATION_BATCH = 4, 16
DEFAULT_BATCHES = {"cpu": (1, 32, 256)}
ACCELERATOR_BATCHES = (1, 32, 256, 1024)

Say = Callable[[str], None]
Made = Mapping[str, tuple[Engine, Bind | str]]
"""By key: an engine, and what it was made to, or why it is not measured."""


def benchmark_inference(
    graph: IntegerGraph,
    *,
    threads: int,
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 10,
    pixels: np.ndarray | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Time all engines that there are.

    Args:
        graph: The network.
        threads: Of each engine on the CPU.
        batch_sizes: Images of a call; None for those of the device.
        rounds: How often each engine has its turn, at each batch size.
        pixels: uint8 images to run; None for noise.
        say: Told what is being done.

    Returns:
        JSON-able: the network, the device's roofline, and for each batch size a row for each engine
        and sentences about where integers lose.

    Raises:
        BenchmarkError: Engines disagree.
    """
    device = platform()
    if pixels is not None and not are_usable(graph, pixels):
        pixels = None
    batch = make_images(graph, CALIBRATION_BATCHES * CALIBRATION_BATCH, pixels)
    setup = Setup(graph, threads, np.split(batch, CALIBRATION_BATCHES))
    made = _make_all(engines_of(device), setup, say)
    batches = []
    for size in batch_sizes or DEFAULT_BATCHES.get(device, ACCELERATOR_BATCHES):
        images = make_images(graph, size, pixels)
        say(f"batch {size}: comparing the engines' results")
        rows, calls = _compared(made, graph, images)
        say(f"batch {size}: {rounds} rounds of {len(calls)} engines")
        _measure(rows, calls, graph, size, rounds)
        families = {key: engine.family for key, (engine, _) in made.items()}
        batches.append({"batch_size": size, "engines": rows, "notes": notes(rows, families)})
    return {
        "network": _describe(graph),
        "images": "noise" if pixels is None else "test images of the run",
        "roofline": _describe_roofline(),
        "batches": batches,
    }


def _describe(graph: IntegerGraph) -> dict[str, Any]:
    return {
        "name": graph.metadata.get("name"),
        "input_shape": list(graph.input_shape),
        "macs": roofline.macs(graph),
        "parameters": roofline.parameters(graph),
        "integer_bytes": graph.size_bytes(),
    }


def _describe_roofline() -> dict[str, Any] | None:
    device = roofline.known_device()
    return None if device is None else dataclasses.asdict(device)


def _make_all(engines: Sequence[Engine], setup: Setup, say: Say) -> Made:
    made: dict[str, tuple[Engine, Bind | str]] = {}
    for engine in engines:
        missing = engine.missing()
        if missing is not None:
            made[engine.key] = engine, f"{missing} is not installed"
            continue
        say(f"making {engine.label}")
        try:
            made[engine.key] = engine, engine.make(setup)
        except Exception as error:  # Each engine has its own, for what it does not serve.
            made[engine.key] = engine, _reason(error)
    return made


def _compared(
    made: Made, graph: IntegerGraph, images: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, Call]]:
    """A row for each engine, and the calls of those whose results are right."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    results: dict[str, np.ndarray] = {}
    for key, (engine, bind) in made.items():
        rows[key] = {"key": key, "label": engine.label, "precision": engine.precision}
        if isinstance(bind, str):
            rows[key]["not_measured"] = bind
            continue
        try:
            calls[key] = bind(images)
            results[key] = np.asarray(calls[key]())
        except Exception as error:
            calls.pop(key, None)
            rows[key]["not_measured"] = _reason(error)
    where = f"batch {len(images)}"
    for key in (FLOAT, INTEGER):
        if key not in results:
            reason = rows[key]["not_measured"]
            raise BenchmarkError(f"{where}: {made[key][0].label} cannot run this network: {reason}")
    engines = {key: engine for key, (engine, _) in made.items()}
    for agreement in check(engines, results, graph, where):
        rows[agreement.engine]["agreement"] = dataclasses.asdict(agreement)
    return list(rows.values()), calls


def _reason(error: Exception) -> str:
    """The first line of a message, which may be a compiler's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def check(
    engines: Mapping[str, Engine],
    results: Mapping[str, np.ndarray],
    graph: IntegerGraph,
    where: str,
) -> list[Agreement]:
    """Compare every result with that of another engine.

    Float engines are compared with JAX FP32, integer engines with JAX integer. JAX integer itself
    is compared with JAX FP32, and so are engines that quantize the float network on their own.

    Args:
        engines: Engines by key.
        results: Results by key, for the engines that have one; JAX FP32 and JAX integer are among
            them.
        graph: The network.
        where: What was run, for the error message.

    Raises:
        BenchmarkError: If two results differ by more than the limit.
    """
    agreements = []
    for key, result in results.items():
        if key == FLOAT:
            continue
        engine = engines[key]
        if engine.kind == "float":
            against, limit = FLOAT, float_limit(graph, engine.precision)
        elif engine.kind == "other":
            against, limit = FLOAT, QUANTIZED_LIMIT
        elif key == INTEGER:
            against, limit = FLOAT, quantized_limit(graph)
        else:
            against = INTEGER
            limit = EXACT_LIMIT if engine.kind == "exact" else quantized_limit(graph)
        agreements.append(compare(key, result, against, results[against], limit, where))
    return agreements


def _measure(
    rows: list[dict[str, Any]],
    calls: Mapping[str, Call],
    graph: IntegerGraph,
    batch: int,
    rounds: int,
) -> None:
    """Add times to the rows of the engines that are called."""
    seconds = alternate(calls, rounds=rounds)
    device = roofline.known_device()
    for row in rows:
        if row["key"] not in seconds:
            continue
        row |= summarize(seconds[row["key"]], batch)
        if row["precision"] == "integer" and device is not None:
            row["roofline_share"] = roofline.least_seconds(graph, batch, device) / row["median_s"]
    add_ratios(rows, BASELINES)


def notes(rows: Sequence[Mapping[str, Any]], families: Mapping[str, str]) -> list[str]:
    """Where an integer engine is slower than a float one of its family, in words.

    Args:
        rows: Of one batch size.
        families: By key of the engine.
    """
    measured = [row for row in rows if "median_s" in row]
    found = []
    for row in (row for row in measured if row["precision"] == "integer"):
        for other in measured:
            rival = (
                other["precision"] != "integer" and families[row["key"]] == families[other["key"]]
            )
            if rival or (row["key"], other["key"]) == ("ort_integer", STATIC):
                ratio = other["median_s"] / row["median_s"]
                if round(ratio, 2) < 1:  # As it is told.
                    found.append(
                        f"{row['label']} is slower than {other['label']} here: "
                        f"{ratio:.2f} times its speed."
                    )
    return found
