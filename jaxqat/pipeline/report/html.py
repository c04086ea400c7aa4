"""The page itself: what is shown of a run, in which order, and with which figures."""

import base64
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from jaxqat.pipeline.report import figures, paper, tables, theme
from jaxqat.pipeline.report.files import ReportError, write_atomically
from jaxqat.pipeline.report.read import Run, read_run

REPORT_FILE = "report.html"
FIGURES_FOLDER = "figures"
MAX_OPEN_ROWS = 20  # A longer per-class table starts folded.


def write_report(workdir: Path) -> Path:
    """Draws RUN/report.html and RUN/figures/*.png from what the run left in its folder.

    Figures for which the run has no data (no QAT stage, no samples) are left out.

    Returns:
        The page: one file that needs nothing else, no network and no script.

    Raises:
        ReportError: If a file the report needs is missing or broken, or the folder cannot
            be written; the message names the file.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    light, images = draw_all(_drawings(run))
    page = _render(run, images)
    path = workdir / REPORT_FILE
    folder = workdir / FIGURES_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        for name, png in light.items():
            write_atomically(folder / f"{name}.png", partial(_write, png))
        # Last, so that a new page never stands beside old figures.
        write_atomically(path, partial(_write, page.encode()))
    except OSError as error:
        raise ReportError(f"{error.filename or path} cannot be written: {error}.") from error
    return path


def _write(content: bytes, file: Any) -> None:
    file.write(content)


def _drawings(run: Run) -> dict[str, Callable[..., bytes]]:
    """Every figure this run has the data for, by file name, still to be given a theme."""
    drawings: dict[str, Callable[..., bytes]] = {}
    if run.samples is not None and len(run.samples.images):
        drawings["samples"] = partial(figures.draw_samples, run.samples)
    for stage, epochs in run.epochs.items():
        test = run.results[stage]["test"] if stage in run.results else None
        drawings[f"curves_{stage}"] = partial(
            figures.draw_curves, tables.stage_name(stage), epochs, test
        )
    for stage in run.stages:
        test = run.results[stage]["test"]
        names = [str(row["name"]) for row in test["per_class"]]
        drawings[f"confusion_{stage}"] = partial(
            figures.draw_confusion, tables.stage_name(stage), test["confusion_matrix"], names
        )
    ranged = [
        layer
        for layer in run.results.get("layers") or []
        if figures.layer_range(layer, "weight") or figures.layer_range(layer, "act")
    ]
    if ranged:
        drawings["ranges"] = partial(figures.draw_ranges, ranged)
    tensors = (run.results.get("verify") or {}).get("tensors", [])
    if any(tensor["sqnr_db"] is not None for tensor in tensors):
        drawings["errors"] = partial(figures.draw_errors, tensors)
    return drawings


def draw_all(
    drawings: Mapping[str, Callable[..., bytes]],
) -> tuple[dict[str, bytes], dict[str, tuple[str, str]]]:
    """Figures by name: in light colours as PNG, and in both as the page embeds them."""
    light = {name: draw(theme=theme.LIGHT) for name, draw in drawings.items()}
    dark = {name: draw(theme=theme.DARK) for name, draw in drawings.items()}
    return light, {name: (_embed(light[name]), _embed(dark[name])) for name in drawings}


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def template(name: str) -> jinja2.Template:
    """A page's template, which lies beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxqat.pipeline.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _render(run: Run, images: dict[str, tuple[str, str]]) -> str:
    return template("report.html.j2").render(
        run=run,
        results=run.results,
        images=images,
        stages=[(stage, tables.stage_name(stage)) for stage in run.stages],
        curves=[(stage, tables.stage_name(stage)) for stage in run.epochs],
        headline=_headline(run),
        facts=_facts(run),
        scores=tables.scores(run),
        departures=paper.departures(run),
        on_paper_data=paper.is_on_paper_data(run),
        test_images=_test_images(run),
        per_class=tables.per_class(run),
        fold_classes=len(tables.per_class(run)) > MAX_OPEN_ROWS,
        confusions={stage: tables.confusions(run.results[stage]["test"]) for stage in run.stages},
        frozen=any(record.get("frozen") for record in run.epochs.get("qat", [])),
        layers=tables.layers(run),
        verification=tables.verification(run),
        post_training=tables.post_training(run),
        size=tables.size(run),
        speed=tables.speed(run),
        device=(run.results.get("environment") or {}).get("device"),
    )


def _headline(run: Run) -> list[tuple[str, str]]:
    """The few numbers that a reader came for."""
    numbers = [
        (f"{tables.percent(run.results[stage]['test']['accuracy'])} %", tables.stage_name(stage))
        for stage in run.stages
    ]
    last = run.stages[-1]
    if run.stages[0] == "fp32" != last:
        change = run.results[last]["test"]["accuracy"] - run.results["fp32"]["test"]["accuracy"]
        label = f"points, {tables.stage_name(last)} − FP32"
        numbers.append((tables.minus(f"{100 * change:+.2f}"), label))
    size = tables.size(run)
    if size and size["ratio"] != tables.DASH:
        numbers.append((f"{size['ratio']}×", "smaller weights"))
    return numbers


def _test_images(run: Run) -> str:
    """Over how many images the scores were taken."""
    test = run.results[run.stages[0]]["test"]
    return tables.count(sum(sum(row) for row in test["confusion_matrix"]))


def _facts(run: Run) -> list[tuple[str, str]]:
    """What identifies a run, as terms and their values; what it did not record is left out."""
    results, environment = run.results, dict(run.results.get("environment") or {})
    data = results.get("data") or {}
    facts = [
        ("Model", _model(run)),
        ("Data set", data.get("name")),
        ("Description", data.get("description")),
        ("Seed", results.get("seed")),
        ("Precision", results.get("precision")),
        ("Device", environment.pop("device", None)),
        ("Date", environment.pop("date", None)),
        ("Environment", ", ".join(f"{key} {value}" for key, value in environment.items())),
        ("Config hash", results.get("config_hash")),
        ("Command", results.get("command")),
    ]
    return [(term, str(value)) for term, value in facts if value not in (None, "")]


def _model(run: Run) -> str | None:
    model = run.config.get("model")
    if not isinstance(model, dict) or "depth" not in model:
        return None
    rest = ", ".join(f"{key} {value}" for key, value in model.items() if key != "depth")
    return f"ResNet-{model['depth']}" + (f", {rest}" if rest else "")
