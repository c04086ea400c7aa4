"""Measurements as tables in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_benchmark(result: Mapping[str, Any], console: Console) -> None:
    """Show what `benchmark` measured."""
    if result["what"] == "inference":
        for batch in result["batches"]:
            console.print(_inference_table(result, batch))
            _print_notes([*_not_measured(batch), *batch["notes"]], console)
        _say(_inference_conditions(result), console)
    else:
        console.print(_training_table(result))
        _print_notes(result["notes"], console)
    _say(_conditions(result), console)


def _inference_table(result: Mapping[str, Any], batch: Mapping[str, Any]) -> Table:
    rows = [row for row in batch["engines"] if "median_s" in row]
    name = result["network"]["name"] or "inference"
    table = _table(f"{name}: batch {batch['batch_size']}", "engine")
    columns = {"images/s": _rate, "ms": _milliseconds, "spread": _spread, "error": _error}
    columns |= {"x JAX\nFP32": lambda row: _ratio(row["ratio_to_jax_fp32"])}
    if any(row["ratio_to_ort_fp32"] is not None for row in rows):
        columns |= {"x ORT\nFP32": lambda row: _ratio(row["ratio_to_ort_fp32"])}
    if result["roofline"] is not None:
        columns |= {"of\nroofline": _share}
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["label"], *(cell(row) for cell in columns.values()))
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=Text(title))  # A name may hold what would be markup.
    table.add_column(first, overflow="fold")
    return table


def _rate(row: Mapping[str, Any]) -> str:
    return f"{row['images_per_s']:,.0f}"


def _milliseconds(row: Mapping[str, Any]) -> str:
    return f"{1000 * row['median_s']:.2f}"


def _spread(row: Mapping[str, Any]) -> str:
    low, high = row["quartiles_s"]
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


def _training_table(result: Mapping[str, Any]) -> Table:
    name, batch = result["network"]["name"], result["batch_size"]
    table = _table(f"{name}, training step: batch {batch}", "precision")
    columns = {"images/s": _rate, "ms": _milliseconds, "spread": _spread}
    columns |= {
        "x FP32": lambda row: _ratio(row["ratio_to_fp32"]),
        "temporary\nMB": _temporary,
        "cosine\nto FP32": lambda row: f"{row['cosine_to_fp32']:.3f}",
    }
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["precisions"]:
        table.add_row(row["label"], *(cell(row) for cell in columns.values()))
    return table


def _temporary(row: Mapping[str, Any]) -> str:
    memory = row["temporary_bytes"]
    return "" if memory is None else f"{memory / 1e6:,.0f}"


def _not_measured(batch: Mapping[str, Any]) -> list[str]:
    rows = (row for row in batch["engines"] if "not_measured" in row)
    return [f"{row['label']} is not measured: {row['not_measured']}" for row in rows]


def _print_notes(notes: list[str], console: Console) -> None:
    for note in notes:
        _say(note, console)


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


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


def _conditions(result: Mapping[str, Any]) -> str:
    environment, load = result["environment"], result["load_average"]
    on_cpu = environment["platform"] == "cpu"
    where = environment["processor"] if on_cpu else environment["device"]
    text = f"{where}; medians of {result['rounds']} rounds in alternation, spread between quartiles"
    if on_cpu:
        text += f"; each engine uses {result['threads']} threads"
    if load is not None:
        text += (
            f"; load average {load['before']:.1f} before, {load['after']:.1f} after, "
            f"{environment['cpu_count']} processors"
        )
    return text + "."
