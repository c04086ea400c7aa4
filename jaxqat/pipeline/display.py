"""Results as tables in the terminal."""

import json

from rich.console import Console

from jaxqat.analysis import Analysis
from jaxqat.analysis._text import decibels, percent
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.evaluation import Measured
from jaxqat.pipeline.measurements import Comparison, Evaluation
from jaxqat.pipeline.results import Results, RunInfo, Scores, VerificationResult, to_json
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.scores import REESTIMATED
from jaxqat.pipeline.terminal import print_table, say, tell

SCORES = ("accuracy", "precision", "recall", "F1", "loss")


def console_for(console: Console | None, *, as_json: bool) -> Console:
    """Return where a command prints for people: beside its JSON, that is standard error."""
    return console or Console(stderr=as_json)


def print_json(measurement: RunInfo) -> None:
    """Print a measurement as JSON on standard output."""
    print(json.dumps(to_json(measurement), indent=1))


def print_results(results: Results, console: Console, *, reestimated: bool = False) -> None:
    """Print the scores of all networks on the test split.

    Args:
        results: The scores.
        console: Where they are printed.
        reestimated: Whether the statistics of batch norm were estimated again before quantization.
    """
    title = f"{results.name}: {results.data['name']}, test split"
    rows = [(network.name, *_scores(network.test)) for network in results.tested()]
    print_table(title, ("network", *SCORES), rows, console)
    if reestimated:
        say(f"note: {REESTIMATED}", console)
    ptq = [(f"PTQ ({name})", each.verify) for name, each in results.ptq.items()]
    for stage, check in (*ptq, ("QAT", results.verify)):
        if check is not None:
            say(f"{stage}: {_verdict(check)}", console)


def print_verification(title: str, check: VerificationResult, console: Console) -> None:
    """Print where two networks differ, tensor by tensor."""
    if check.tensors:
        _print_tensors(f"{title}, {check.images:,} images", check, console)
    say(_verdict(check), console)
    for failure in check.failures:
        warn(failure, console)


def _print_tensors(title: str, check: VerificationResult, console: Console) -> None:
    rows = [
        (t.name, *(f"{n:,}" for n in (t.codes, t.differing, t.largest)), decibels(t.sqnr_db))
        for t in check.tensors
    ]
    header = ("tensor", "codes", "differ", "largest", "SQNR (dB)")
    print_table(title, header, rows, console, red=[t.differing > 0 for t in check.tensors])


def print_analysis(title: str, analysis: Analysis, console: Console) -> None:
    """Print which layers cost accuracy."""
    (first, *numbers), *layers = analysis.rows()
    header = (first, *(name.replace(" ", "\n") for name in numbers))
    caption = (
        "The most sensitive layer first. dB: SQNR, higher is better; alone: with this layer "
        "quantized and no other; without: with all layers but this one; top-1: accuracy in %."
    )
    print_table(title, header, layers, console, caption=caption, dense=True)
    say(analysis.summary(), console)


def note_islands(graph: IntegerGraph, console: Console) -> None:
    """Name the parts of an integer network that are computed in float."""
    for island in graph.islands:
        tell(f"computed in float, without an integer form: {island}", console)


def _verdict(check: VerificationResult) -> str:
    largest = f" (by at most {check.largest})" if check.differing else ""
    flips = f"{check.top1_flips:,} of {check.images:,} images change their class"
    if check.nan_inputs:
        flips += f"; {check.nan_inputs:,} input values are NaN and got the code of zero"
    if check.logits_only:
        return f"verify: {flips}"
    return f"verify: {check.differing:,} of {check.codes:,} codes differ{largest}; {flips}"


def warn(message: str, console: Console) -> None:
    """Print a warning."""
    say(f"warning: {message}", console, style="yellow")


def keep_evaluation(
    folder: RunFolder, name: str, result: Evaluation | Comparison, console: Console
) -> None:
    """Write a measurement to the run folder; if that is read-only, print a warning."""
    if folder.write_evaluation(name, result) is None:
        warn(f"{folder.path}: is read-only, so the result was not written to it.", console)


def print_evaluation(title: str, measured: Measured, console: Console) -> None:
    """Print the scores of a network on a split, class by class."""
    scores = measured.scores
    rows = [
        (each.name, *map(_percent, (each.precision, each.recall, each.f1)), f"{each.support:,}")
        for each in scores.per_class
    ]
    print_table(title, ("class", "precision", "recall", "F1", "images"), rows, console)
    summary = ", ".join(f"{n} {v}" for n, v in zip(SCORES, _scores(scores), strict=True))
    say(f"{summary}; {measured.images_per_s:,.0f} images/s", console)


def _scores(scores: Scores) -> list[str]:
    shares = (scores.accuracy, scores.precision, scores.recall, scores.f1)
    return [*map(_percent, shares), f"{scores.loss:.4f}"]


def _percent(share: float) -> str:
    return f"{percent(share)} %"
