"""Measurements as tables in the terminal."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console

from jaxqat.pipeline.terminal import print_table, say


def print_benchmark(result: Mapping[str, Any], console: Console) -> None:
    """Show what `benchmark` measured."""
    if result["what"] == "inference":
        for batch in result["batches"]:
            _print_inference(result, batch, console)
            _print_notes([*_not_measured(batch["engines"]), *batch["notes"]], console)
        say(_inference_conditions(result), console)
    elif result["what"] == "libraries":
        _print_libraries(result, console)
        _print_notes(_not_measured(result["libraries"]), console)
    else:
        _print_training(result, console)
        _print_notes(result["notes"], console)
    say(conditions(result), console)


def _print_inference(result: Mapping[str, Any], batch: Mapping[str, Any], console: Console) -> None:
    rows = [row for row in batch["engines"] if "median_s" in row]
    columns = {"engine": _label, "images/s": _rate, "ms": _milliseconds, "spread": spread}
    columns |= {"error": _error, "x JAX\nFP32": lambda row: _ratio(row["ratio_to_jax_fp32"])}
    if any(row["ratio_to_ort_fp32"] is not None for row in rows):
        columns |= {"x ORT\nFP32": lambda row: _ratio(row["ratio_to_ort_fp32"])}
    if result["roofline"] is not None:
        columns |= {"of\nroofline": _share}
    name = result["network"]["name"] or "inference"
    _print_columns(f"{name}: batch {batch['batch_size']}", columns, rows, console)


def _print_columns(
    title: str,
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]],
    measured: Iterable[Mapping[str, Any]],
    console: Console,
) -> None:
    rows = [[cell(row) for cell in columns.values()] for row in measured]
    print_table(title, list(columns), rows, console)


def _label(row: Mapping[str, Any]) -> str:
    return row["label"]


def _rate(row: Mapping[str, Any]) -> str:
    return f"{row['images_per_s']:,.0f}"


def _milliseconds(row: Mapping[str, Any]) -> str:
    return f"{1000 * row['median_s']:.2f}"


def spread(row: Mapping[str, Any]) -> str:
    """Return the distance of the quartiles in percent of the median."""
    low, high = row["quartiles_s"]
    if low == high:  # Of one round.
        return ""
    return f"{100 * (high - low) / row['median_s']:.0f} %"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _error(row: Mapping[str, Any]) -> str:
    if "agreement" not in row:
        return ""
    error = row["agreement"]["error"]
    return "0" if error == 0 else f"{error:.1e}"


def _share(row: Mapping[str, Any]) -> str:
    share = row.get("roofline_share")
    return "" if share is None else f"{100 * share:.1f} %"


def _print_training(result: Mapping[str, Any], console: Console) -> None:
    columns = {"precision": _label, "images/s": _rate, "ms": _milliseconds, "spread": spread}
    columns |= {
        "x FP32": lambda row: _ratio(row["ratio_to_fp32"]),
        "temporary\nMB": _temporary,
        "cosine\nto FP32": _cosine,
    }
    title = f"{result['network']['name']}, training step: batch {result['batch_size']}"
    _print_columns(title, columns, result["precisions"], console)


def _cosine(row: Mapping[str, Any]) -> str:
    found = row["cosine_to_fp32"]
    return "" if found is None else f"{found:.3f}"


def _temporary(row: Mapping[str, Any]) -> str:
    memory = row["temporary_bytes"]
    return "" if memory is None else f"{memory / 1e6:,.0f}"


def _print_libraries(result: Mapping[str, Any], console: Console) -> None:
    rows = [row for row in result["libraries"] if "median_s" in row]
    columns = {
        "library": _label,
        "kernels\ntrained": lambda row: f"{row['kernels_trained']} of {row['kernels']}",
        "integer\nproducts": lambda row: f"{row['integer_products']} of {row['products']}",
        "compile\ns": lambda row: f"{row['compile_s']:.1f}",
        "ms": _milliseconds,
        "spread": spread,
        "x FP32": lambda row: _ratio(row["ratio_to_float"]),
    }
    if result["test_images"] is not None:
        columns["accuracy"] = lambda row: f"{100 * row['accuracy']:.2f} %"
    title = f"{result['network']['name']}, training step: batch {result['batch_size']}"
    _print_columns(title, columns, rows, console)
    if result["test_images"] is not None:
        text = (
            f"Accuracy on {result['test_images']:,} test images after {result['qat_epochs']} "
            "epochs of QAT from the run's FP32 network."
        )
        say(text, console)


def _not_measured(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"{row['label']} is not measured: {row['not_measured']}"
        for row in rows
        if "not_measured" in row
    ]


def _print_notes(notes: list[str], console: Console) -> None:
    for note in notes:
        say(note, console)


def _inference_conditions(result: Mapping[str, Any]) -> str:
    network = result["network"]
    on_cpu = result["environment"]["platform"] == "cpu"
    start = "in the host's memory" if on_cpu else "on the device already"
    text = (
        f"{network['macs'] / 1e6:,.1f} M multiply-accumulates an image. Measured from float32 "
        f"images (batch, {', '.join(map(str, network['input_shape']))}), {result['images']}, "
        f"{start}, to logits; batch norm is folded in all engines. " + _references(result)
    )
    if not on_cpu and result["roofline"] is None:
        text += " Unknown device: no roofline."
    return text


def _references(result: Mapping[str, Any]) -> str:
    """What each error is relative to."""
    text = "Errors are root mean squares of logits relative to those of JAX FP32"
    rows = [row for row in result["batches"][-1]["engines"] if "agreement" in row]
    of_integers = [r["label"] for r in rows if r["agreement"]["against"] == "jax_integer"]
    if of_integers:
        text += f"; errors of {', '.join(of_integers)} are relative to JAX integer"
    return f"{text}."


def conditions(result: Mapping[str, Any]) -> str:
    """Return where and how often was measured."""
    environment, load = result["environment"], result["load_average"]
    on_cpu = environment["platform"] == "cpu"
    where = environment["processor"] if on_cpu else environment["device"]
    rounds = result["rounds"]
    text = f"{where}; medians of {rounds} rounds in alternation, spread between quartiles"
    if rounds == 1:
        text = f"{where}; one round, so no spread"
    if on_cpu:
        text += f"; each engine uses {result['threads']} threads"
    if load is not None:
        text += (
            f"; load average {load['before']:.1f} before, {load['after']:.1f} after, "
            f"{environment['cpu_count']} processors"
        )
    return text + "."
