"""Results as tables in the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxqat.pipeline.evaluation import Measured
from jaxqat.pipeline.results import Results, Scores, VerificationResult


def print_results(results: Results, console: Console) -> None:
    """Print the scores of all networks on the test split."""
    table = Table(title=f"{results.name}: {results.data['name']}, test split")
    table.add_column("network")
    for column in ("accuracy", "precision", "recall", "F1", "loss"):
        table.add_column(column, justify="right")
    for network in results.tested():
        table.add_row(network.name, *_scores(network.test))
    console.print(table)
    ptq = None if results.ptq is None else results.ptq.verify
    for stage, check in (("PTQ", ptq), ("QAT", results.verify)):
        if check is not None:
            console.print(f"{stage}: {_verdict(check)}", highlight=False, soft_wrap=True)


def print_verification(title: str, check: VerificationResult, console: Console) -> None:
    """Print where two networks differ, tensor by tensor."""
    table = Table(title=f"{title}, {check.images:,} images")
    table.add_column("tensor", overflow="fold")
    for column in ("codes", "differ", "largest", "SQNR"):
        table.add_column(column, justify="right")
    for tensor in check.tensors:
        sqnr = "–" if tensor.sqnr_db is None else f"{tensor.sqnr_db:.1f} dB"
        counts = (f"{n:,}" for n in (tensor.codes, tensor.differing, tensor.largest))
        style = "red" if tensor.differing else None
        table.add_row(Text(tensor.name), *counts, sqnr, style=style)
    if check.tensors:
        console.print(table)
    console.print(_verdict(check), highlight=False, soft_wrap=True)
    for failure in check.failures:
        warn(failure, console)


def print_analysis(title: str, rows: list[tuple[str, ...]], summary: str, console: Console) -> None:
    """Print which layers cost accuracy: rows of an `Analysis`, the header first; its summary."""
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


def _verdict(check: VerificationResult) -> str:
    largest = f" (by at most {check.largest})" if check.differing else ""
    flips = f"{check.top1_flips:,} of {check.images:,} images change their class"
    if check.logits_only:
        return f"verify: {flips}"
    return f"verify: {check.differing:,} of {check.codes:,} codes differ{largest}; {flips}"


def warn(message: str, console: Console) -> None:
    """Print a warning."""
    console.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def print_evaluation(title: str, measured: Measured, console: Console) -> None:
    """Print the scores of a network on a split, class by class."""
    scores = measured.scores
    table = Table(title=title)
    for column in ("class", "precision", "recall", "F1", "images"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for each in scores.per_class:
        cells = (f"{100 * score:.2f} %" for score in (each.precision, each.recall, each.f1))
        table.add_row(each.name, *cells, str(each.support))
    console.print(table)
    names = ("accuracy", "precision", "recall", "F1", "loss")
    summary = ", ".join(f"{n} {v}" for n, v in zip(names, _scores(scores), strict=True))
    console.print(f"{summary}; {measured.images_per_s:,.0f} images/s", highlight=False)


def _scores(scores: Scores) -> list[str]:
    shares = (scores.accuracy, scores.precision, scores.recall, scores.f1)
    return [*(f"{100 * share:.2f} %" for share in shares), f"{scores.loss:.4f}"]
