"""Benchmark inference of one network, from float32 images to logits, in several engines."""

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

Log = Callable[[str], None]
Built = Mapping[str, tuple[Engine, Bind | str]]
"""By key: an engine with its network, or with the reason why it is not measured."""


def benchmark_inference(
    graph: IntegerGraph,
    *,
    threads: int,
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 10,
    pixels: np.ndarray | None = None,
    log: Log = lambda text: None,
) -> dict[str, Any]:
    """Time all installed engines.

    Args:
        graph: The network.
        threads: Number of threads of each engine on the CPU.
        batch_sizes: Images per call; None for the device's default sizes.
        rounds: Number of measurements of each engine for each batch size.
        pixels: uint8 images to run; None for noise.
        log: Receives progress messages.

    Returns:
        As JSON values: the network, the device's roofline, and for each batch size a table row for
        each engine and notes on slower integer engines.

    Raises:
        BenchmarkError: If engines disagree, or JAX cannot run the network.
    """
    device = platform()
    if pixels is not None and not are_usable(graph, pixels):
        pixels = None
    batch = make_images(graph, CALIBRATION_BATCHES * CALIBRATION_BATCH, pixels)
    setup = Setup(graph, threads, np.split(batch, CALIBRATION_BATCHES))
    built = _build_all(engines_of(device), setup, log)
    batches = []
    for size in batch_sizes or DEFAULT_BATCHES.get(device, ACCELERATOR_BATCHES):
        images = make_images(graph, size, pixels)
        log(f"batch {size}: comparing the engines' results")
        rows, calls = _compare(built, graph, images)
        log(f"batch {size}: {rounds} rounds of {len(calls)} engines")
        _measure(rows, calls, graph, size, rounds)
        families = {key: engine.family for key, (engine, _) in built.items()}
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


def _build_all(engines: Sequence[Engine], setup: Setup, log: Log) -> Built:
    built: dict[str, tuple[Engine, Bind | str]] = {}
    for engine in engines:
        missing = engine.missing()
        if missing is not None:
            built[engine.key] = engine, f"{missing} is not installed"
            continue
        log(f"building {engine.label}")
        try:
            built[engine.key] = engine, engine.make(setup)
        except Exception as error:  # Each engine has its own exceptions.
            built[engine.key] = engine, _reason(error)
    return built


def _compare(
    built: Built, graph: IntegerGraph, images: np.ndarray
) -> tuple[list[dict[str, Any]], dict[str, Call]]:
    """Run each engine once and check its result; return table rows and the calls to time."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    results: dict[str, np.ndarray] = {}
    for key, (engine, bind) in built.items():
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
            label = built[key][0].label
            raise BenchmarkError(f"{where}: {label} cannot run this network: {reason}")
    engines = {key: engine for key, (engine, _) in built.items()}
    for agreement in check(engines, results, graph, where):
        rows[agreement.engine]["agreement"] = dataclasses.asdict(agreement)
    return list(rows.values()), calls


def _reason(error: Exception) -> str:
    """Return the first line of an error message, which may be a compiler's long one."""
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
        results: Results by engine key; those of JAX FP32 and JAX integer are required.
        graph: The network.
        where: Name of the measurement, for the error message.

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
    """Time the calls and add the times to the rows."""
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
    """Return a sentence for each integer engine that is slower than a float one of its family.

    Args:
        rows: Table rows of one batch size.
        families: Family of each engine, by key.
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
                if round(ratio, 2) < 1:  # As displayed.
                    found.append(
                        f"{row['label']} is slower than {other['label']} here: "
                        f"{ratio:.2f} times its speed."
                    )
    return found
