"""Measurements as tables in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_benchmark(result: Mapping[str, Any], console: Console) -> None:
    """Show what `benchmark` measured."""
    if result["what"] == "inference":
        for batch in result["batches"]:
            console.print(_inference_table(result, batch))
            _print_notes(batch["notes"], console)
        _say(_inference_conditions(result), console)
    else:
        console.print(_training_table(result))
        _print_notes(result["notes"], console)
    _say(_conditions(result), console)


def _inference_table(result: Mapping[str, Any], batch: Mapping[str, Any]) -> Table:
    table = Table(title=f"{result['network']['name'] or 'inference'}: batch {batch['batch_size']}")
    table.add_column("engine")
    columns = ("images/s", "ms", "quartiles", "x JAX FP32", "x ORT FP32", "error against")
    for column in columns:
        table.add_column(column, justify="right")
    on_known_device = result["roofline"] is not None
    if on_known_device:
        table.add_column("of roofline", justify="right")
    for row in batch["engines"]:
        if "not_measured" in row:
            table.add_row(row["label"], f"[dim]{row['not_measured']}[/dim]")
            continue
        cells = _times(row)
        cells += [_ratio(row["ratio_to_jax_fp32"]), _ratio(row["ratio_to_ort_fp32"])]
        cells.append(_agreement(row))
        if on_known_device:
            share = row.get("roofline_share")
            cells.append("" if share is None else f"{100 * share:.1f} %")
        table.add_row(row["label"], *cells)
    return table


def _times(row: Mapping[str, Any]) -> list[str]:
    low, high = (1000 * s for s in row["quartiles_s"])
    return [
        f"{row['images_per_s']:,.0f}",
        f"{1000 * row['median_s']:.2f}",
        f"{low:.2f} to {high:.2f}",
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _agreement(row: Mapping[str, Any]) -> str:
    if "agreement" not in row:
        return ""
    error = row["agreement"]["error"]
    return f"{'0' if error == 0 else f'{error:.1e}'} {row['agreement']['against']}"


def _training_table(result: Mapping[str, Any]) -> Table:
    table = Table(title=f"training step: batch {result['batch_size']}")
    table.add_column("precision")
    columns = ("images/s", "ms", "quartiles", "x FP32", "temporary MB", "cosine to FP32")
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["precisions"]:
        memory = row["temporary_bytes"]
        table.add_row(
            row["label"],
            *_times(row),
            _ratio(row["ratio_to_fp32"]),
            "" if memory is None else f"{memory / 1e6:,.0f}",
            f"{row['cosine_to_fp32']:.3f}",
        )
    return table


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
        f"{start}, to logits; batch norm is folded in all engines."
    )
    if not on_cpu and result["roofline"] is None:
        text += " Unknown device: no roofline."
    return text


def _conditions(result: Mapping[str, Any]) -> str:
    environment, load = result["environment"], result["load_average"]
    on_cpu = environment["platform"] == "cpu"
    where = environment["processor"] if on_cpu else environment["device"]
    text = f"{where}; medians and quartiles of {result['rounds']} rounds in alternation"
    if on_cpu:
        text += f"; each engine uses {result['threads']} threads"
    if load is not None:
        text += (
            f"; load average {load['before']:.1f} before, {load['after']:.1f} after, "
            f"{environment['cpu_count']} processors"
        )
    return text + "."
