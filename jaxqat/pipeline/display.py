"""Results as tables in the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxqat.pipeline.run.results import summary_rows


def print_results(results: dict[str, Any], console: Console) -> None:
    """Show what was achieved on the test split."""
    table = Table(title=f"{results['name']}: {results['data']['name']}, test split")
    table.add_column("network")
    for column in ("accuracy", "precision", "recall", "F1", "loss"):
        table.add_column(column, justify="right")
    for name, metrics in summary_rows(results):
        table.add_row(name, *_scores(metrics))
    console.print(table)
    ptq = results.get("ptq", {})
    for name, check in (("ptq, ", ptq.get("verify")), ("", results.get("verify"))):
        if check is not None:
            console.print(name + _verdict(check), highlight=False, soft_wrap=True)


def print_verification(check: dict[str, Any], console: Console) -> None:
    """Show where two networks differ, tensor by tensor; `check` is a `Verification` as a dict."""
    table = Table(title=f"{check['name']}: {check['of']}, {check['images']:,} images")
    table.add_column("tensor", overflow="fold")
    for column in ("codes", "differ", "largest", "SQNR"):
        table.add_column(column, justify="right")
    for row in check["tensors"]:
        sqnr = "–" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
        counts = (f"{row[key]:,}" for key in ("codes", "differing", "largest"))
        table.add_row(Text(row["name"]), *counts, sqnr, style="red" if row["differing"] else None)
    if check["tensors"]:
        console.print(table)
    console.print(_verdict(check), highlight=False, soft_wrap=True)
    for failure in check["failures"]:
        warn(failure, console)


def print_analysis(title: str, rows: list[tuple[str, ...]], summary: str, console: Console) -> None:
    """Show which layers cost what: the rows of an `Analysis`, its head first, and its summary."""
    head, *layers = rows
    caption = "The most sensitive layer first; dB: SQNR, higher is better."
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=0)
    table.add_column(head[0], overflow="fold")
    for column in head[1:]:
        table.add_column(column.replace(" ", "\n"), justify="right")
    for first, *cells in layers:
        table.add_row(Text(first), *cells)
    console.print(table)
    console.print(summary, highlight=False, soft_wrap=True)


def _verdict(check: dict[str, Any]) -> str:
    largest = f" (by {check['largest']} at most)" if check["differing"] else ""
    flips = f"{check['top1_flips']:,} of {check['images']:,} images change their class"
    if check["logits_only"]:
        return f"verify: {flips}"
    return f"verify: {check['differing']:,} of {check['codes']:,} codes differ{largest}; {flips}"


def warn(message: str, console: Console) -> None:
    """Show what went otherwise than a person would want, though nothing failed."""
    console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """Show the metrics of one network on one split, class by class."""
    metrics = result["metrics"]
    table = Table(
        title=f"{result['name']}: {result['stage']} at step {result['step']}, "
        f"{metrics['n']} images of the {result['split']} split"
    )
    for column in ("class", "precision", "recall", "F1", "images"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in metrics["per_class"]:
        scores = (f"{100 * row[key]:.2f} %" for key in ("precision", "recall", "f1"))
        table.add_row(row["name"], *scores, str(row["support"]))
    console.print(table)
    names = ("accuracy", "precision", "recall", "F1", "loss")
    scores = ", ".join(f"{n} {v}" for n, v in zip(names, _scores(metrics), strict=True))
    console.print(f"{scores}; {result['evaluate_images_per_s']:,.0f} images/s", highlight=False)


def _scores(metrics: dict[str, Any]) -> list[str]:
    percent = [f"{100 * metrics[key]:.2f} %" for key in ("accuracy", "precision", "recall", "f1")]
    return [*percent, f"{metrics['loss']:.4f}"]
