"""The page of a run: its sections, tables and figures."""

import base64
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jinja2

from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline.report import figures, gallery, paper, tables, theme
from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.read import Run, read_run
from jaxqat.pipeline.results import Results
from jaxqat.pipeline.scores import REESTIMATED

REPORT_FILE = "report.html"
ANALYSIS_PAGE = "analysis.html"
FIGURES_FOLDER = "figures"
MAX_OPEN_ROWS = 20  # A longer table of classes is closed at first.


def write_report(workdir: Path) -> Path:
    """Write RUN/report.html and RUN/figures/*.png from the files of a run folder.

    Figures without data (no QAT stage, no samples) are left out. The page links to analysis.html
    if `jaxqat analyze` has written it.

    Returns:
        Path of the page: one self-contained file, without scripts.

    Raises:
        ReportError: If a file that the report needs is missing or broken, or the folder cannot
            be written; the message names the file.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    light, images = draw_all(_drawings(run))
    if run.samples is not None and len(run.samples.samples):  # The page has the images themselves.
        light["samples"] = figures.draw_samples(run.samples, theme.LIGHT)
    page = _render(run, images, has_analysis=(workdir / ANALYSIS_PAGE).is_file())
    path = workdir / REPORT_FILE
    write_figures(workdir / FIGURES_FOLDER, light)
    # Written last, so that a new page never comes with old figures.
    write_atomically(path, page, error=ReportError)
    return path


def _drawings(run: Run) -> dict[str, Callable[..., bytes]]:
    """Return a function of the theme for every figure with data, by file name."""
    drawings: dict[str, Callable[..., bytes]] = {}
    results, tested = run.results, {network.key: network for network in run.results.tested()}
    for stage, epochs in run.epochs.items():
        name, test = stage.upper(), tested[stage].test if stage in tested else None
        drawings[f"curves_{stage}"] = partial(figures.draw_curves, name, epochs, test)
    for key, name, test in tested.values():
        classes = [each.name for each in test.per_class]
        drawings[f"confusion_{key}"] = partial(
            figures.draw_confusion, name, test.confusion_matrix, classes
        )
    drawings["f1"] = partial(figures.draw_f1, tables.compared(results))
    sizes = tables.sizes(results)
    if len(sizes) > 1:
        drawings["sizes"] = partial(figures.draw_sizes, sizes)
    if results.layers:
        drawings["ranges"] = partial(figures.draw_ranges, results.layers)
    tensors = () if results.verify is None else results.verify.tensors
    if any(tensor.sqnr_db is not None for tensor in tensors):
        drawings["errors"] = partial(figures.draw_errors, tensors)
    return drawings


def draw_all(
    drawings: Mapping[str, Callable[..., bytes]],
) -> tuple[dict[str, bytes], dict[str, tuple[str, str]]]:
    """Draw figures; return the light ones as PNG, and both themes as data URLs."""
    light = {name: draw(theme=theme.LIGHT) for name, draw in drawings.items()}
    dark = {name: draw(theme=theme.DARK) for name, draw in drawings.items()}
    return light, {name: (_embed(light[name]), _embed(dark[name])) for name in drawings}


def write_figures(folder: Path, figures: Mapping[str, bytes]) -> None:
    """Write figures by their names as PNG files into a folder, which is made.

    Raises:
        ReportError: If they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder}: cannot be made: {error.strerror}.") from error
    for name, png in figures.items():
        write_atomically(folder / f"{name}.png", png, error=ReportError)


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def template(name: str) -> jinja2.Template:
    """Return the template of a page from this folder."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxqat.pipeline.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _sections(run: Run) -> dict[str, str]:
    """Return the titles of the page's sections by their anchors, in order."""
    results, samples = run.results, run.samples
    every = {
        "scores": ("Test scores", True),
        "samples": ("Samples", samples is not None and len(samples.samples) > 0),
        "changed": ("Changed classes", samples is not None and len(samples.changed) > 0),
        "errors": ("Most confident errors", samples is not None and len(samples.errors) > 0),
        "training": ("Training", True),
        "confusion": ("Confusion matrices", True),
        "classes": ("Classes", True),
        "layers": ("Layers", bool(results.layers)),
        "verification": ("Verification", results.verify is not None),
        "size": ("Size and speed", True),
        "configuration": ("Configuration", True),
    }
    return {anchor: title for anchor, (title, is_shown) in every.items() if is_shown}


def _render(run: Run, images: dict[str, tuple[str, str]], *, has_analysis: bool) -> str:
    results, samples = run.results, run.samples
    sections = _sections(run)
    galleries = ("samples", "changed", "errors")
    return template("report.html.j2").render(
        run=run,
        results=results,
        sections=sections,
        analysis=ANALYSIS_PAGE if has_analysis else None,
        cards={name: gallery.cards(samples, name) for name in galleries if name in sections}
        if samples is not None
        else {},
        totals=() if samples is None else tuple(map(tables.count, samples.totals)),
        images=images,
        title=tables.title(results),
        networks=list(results.tested()),
        curves=[(stage, stage.upper()) for stage in run.epochs],
        headline=_headline(results),
        facts=_facts(run),
        scores=tables.scores(run),
        departures=paper.departures(run),
        reestimated=_reestimated(run),
        on_paper_data=paper.is_on_paper_data(run),
        test_images=tables.count(results.fp32.test.n),
        per_class=tables.per_class(results),
        compared=tables.compared(results),
        fold_classes=len(results.fp32.test.per_class) > MAX_OPEN_ROWS,
        confusions={n.key: tables.confusions(n.test) for n in results.tested()},
        frozen=any(record.get("frozen") for record in run.epochs.get("qat", [])),
        layers=tables.layers(results),
        verification=tables.verification(results),
        post_training=tables.post_training(results),
        size=tables.size(results),
        speed=tables.speed(results),
        device=results.environment.device,
    )


def _headline(results: Results) -> list[tuple[str, str]]:
    """Return the most important numbers with their labels."""
    tested = list(results.tested())
    numbers = [(f"{tables.percent(n.test.accuracy)} %", n.name) for n in tested]
    first, last = tested[0], tested[-1]
    if first != last:
        change = last.test.accuracy - first.test.accuracy
        label = f"points, {last.name} − {first.name}"
        numbers.append((tables.minus(f"{100 * change:+.2f}"), label))
    ratio = tables.size(results)["ratio"]
    if ratio != tables.DASH:
        numbers.append((f"{ratio}×", "smaller weights"))
    return numbers


def _reestimated(run: Run) -> str | None:
    qat = run.config.get("qat")
    is_on = isinstance(qat, Mapping) and qat.get("reestimate_batch_norm") is True
    return REESTIMATED if is_on else None


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return what identifies a run, as terms and values."""
    results, environment = run.results, dataclasses.asdict(run.results.environment)
    facts = [
        ("Model", _model(run)),
        ("Data set", results.data.get("name")),
        ("Description", results.data.get("description")),
        ("Seed", results.seed),
        ("Precision", results.precision),
        ("Device", environment.pop("device")),
        ("Date", environment.pop("date")),
        ("Environment", ", ".join(f"{key} {value}" for key, value in environment.items())),
        ("Config hash", results.config_hash),
        ("Command", results.command),
    ]
    return [(term, str(value)) for term, value in facts if value not in (None, "")]


def _model(run: Run) -> str | None:
    model = run.config.get("model")
    if not isinstance(model, dict) or "depth" not in model:
        return None
    if model.get("target") is not None:
        given = ", ".join(f"{k}={v!r}" for k, v in (model.get("arguments") or {}).items())
        return f"{model['target']}({given})"
    own = ("depth", "target", "arguments")
    rest = ", ".join(f"{key} {value}" for key, value in model.items() if key not in own)
    return f"ResNet-{model['depth']}" + (f", {rest}" if rest else "")
