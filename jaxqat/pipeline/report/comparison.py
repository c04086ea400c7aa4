"""The page that compares runs: its tables and figures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxqat.analysis._text import percent
from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline.report import comparison_figures, tables
from jaxqat.pipeline.report.figures import draw_accuracies, draw_f1, draw_sizes
from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.html import draw_all, template, write_figures
from jaxqat.pipeline.report.read import Run, read_run
from jaxqat.pipeline.results import TRAINED_STAGES, Tested

# What must be equal: the test images, and the order of the classes.
SAME = ("name", "num_classes", "image_shape")
MOST_CHANGED = 8
# Of networks, by the first part of their keys: each has a marker of its own in the figures.
KINDS = ("fp32", "ptq", "qat", "integer")


class Named(NamedTuple):
    """A run and what the page calls it."""

    name: str
    run: Run

    @property
    def last(self) -> Tested:
        """The last network that the run made, under the run's name."""
        *_, network = self.run.results.tested()
        return network._replace(name=f"{self.name}: {network.name}")


def write_comparison(folders: Sequence[Path], output: Path, *, figures: Path | None = None) -> Path:
    """Write a page that compares runs with the first of them.

    Args:
        folders: Run folders, two or more.
        output: The page.
        figures: Folder for the figures as PNG; None for none.

    Returns:
        Path of the page: one self-contained file, without scripts.

    Raises:
        ReportError: A file is missing or broken, a run is given twice, the runs were tested on
            different data, or the page cannot be written; names the file or run.
    """
    runs = [
        Named(name, read_run(folder)) for name, folder in zip(_names(folders), folders, strict=True)
    ]
    _check_data(runs)
    light, images = draw_all(_drawings(runs))
    page = template("comparison.html.j2").render(
        title=f"Comparison of {len(runs)} runs",
        first=runs[0].name,
        images=images,
        stages=[stage for stage in TRAINED_STAGES if f"curves_{stage}" in images],
        networks=_networks(runs),
        classes=_classes(runs),
        class_labels=[
            f"{runs[0].name}, F1 (%)",
            *(text for each in runs[1:] for text in (f"{each.name}, F1 (%)", "Change (points)")),
        ],
        confusions=[
            (each.last.name, f"confusion_{number}", _changes(runs[0], each))
            for number, each in enumerate(runs[1:], start=1)
        ],
        test_images=tables.count(runs[0].run.results.fp32.test.n),
    )
    if figures is not None:
        write_figures(figures, light)
    write_atomically(output, page, error=ReportError)
    return output


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the runs apart."""
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        raise ReportError("a run is given twice; each must be another folder.")
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def _check_data(runs: Sequence[Named]) -> None:
    """Refuse runs that were tested on other images or classes."""
    first = runs[0]
    for other in runs[1:]:
        for what, one, two in (
            *((key, *(each.run.results.data.get(key) for each in (first, other))) for key in SAME),
            ("SHA-256 of the test images", _test_sha256(first.run), _test_sha256(other.run)),
            ("test images", *(each.run.results.fp32.test.n for each in (first, other))),
            ("classes", *([c.name for c in each.last.test.per_class] for each in (first, other))),
        ):
            if one != two:
                raise ReportError(
                    f"{first.name} and {other.name} were tested on different data, so their "
                    f"scores cannot be compared: {what}: {one!r} and {two!r}."
                )


def _test_sha256(run: Run) -> str | None:
    found = run.results.data.get("sha256")
    return found.get("test") if isinstance(found, Mapping) else None


def _with_own_fp32(runs: Sequence[Named]) -> list[Named]:
    """Return the runs without those that began with the FP32 network of one before them."""
    found: list[Named] = []
    seen: list[Sequence[Sequence[int]]] = []
    for each in runs:
        fp32 = each.run.results.fp32
        if fp32.from_run is None or fp32.test.confusion_matrix not in seen:
            found.append(each)
        seen.append(fp32.test.confusion_matrix)
    return found


def _drawings(runs: Sequence[Named]) -> dict[str, Callable[..., bytes]]:
    """Return a function of the theme for every figure with data."""
    drawings: dict[str, Callable[..., bytes]] = {}
    points = _points(runs)
    if len(sizes := [(p.name, p.size, p.accuracy) for p in points if p.size is not None]) > 1:
        styles = [p.style for p in points if p.size is not None]
        drawings["sizes"] = partial(draw_sizes, sizes, styles=styles)
    if len(times := [(p.name, 1e3 / p.speed, p.accuracy) for p in points if p.speed]) > 1:
        styles = [p.style for p in points if p.speed]
        drawings["speeds"] = partial(draw_accuracies, times, "Time per image (ms)", styles=styles)
    for stage in TRAINED_STAGES:
        epochs = {
            each.name: each.run.epochs[stage]
            for each in (_with_own_fp32(runs) if stage == "fp32" else runs)
            if stage in each.run.epochs
        }
        if epochs:
            drawings[f"curves_{stage}"] = partial(
                comparison_figures.draw_overlaid, stage.upper(), epochs
            )
    drawings["f1"] = partial(draw_f1, [each.last for each in runs])
    before = runs[0].last.test
    for number, each in enumerate(runs[1:], start=1):
        drawings[f"confusion_{number}"] = partial(
            comparison_figures.draw_confusion_change,
            each.name,
            before.confusion_matrix,
            each.last.test.confusion_matrix,
            [c.name for c in before.per_class],
        )
    return drawings


class _Point(NamedTuple):
    name: str
    accuracy: float
    size: int | None
    speed: float | None
    style: tuple[int, int]
    """Number of its colour, which is its run's, and of its marker, which is its kind's."""


def _points(runs: Sequence[Named]) -> list[_Point]:
    """Return every network of every run; FP32 once where the runs share it."""
    found: list[_Point] = []
    owners = {each.name for each in _with_own_fp32(runs)}
    for place, (name, run) in enumerate(runs):
        sizes = tables.sizes_by_key(run.results)
        for network in run.results.tested():
            speed = run.results.speed.get(network.key)
            point = _Point(
                f"{name}: {network.name}",
                network.test.accuracy,
                sizes.get(network.key),
                None if speed is None else speed.evaluate_images_per_s,
                (place, KINDS.index(network.key.partition("_")[0])),
            )
            if network.key != "fp32" or name in owners:
                found.append(point)
    return found


def _networks(runs: Sequence[Named]) -> list[dict[str, Any]]:
    """Return a row for every network, with the change from the first run's last one."""
    base = runs[0].last.test.accuracy
    return [
        {
            "name": point.name,
            "cells": [
                percent(point.accuracy),
                tables.minus(f"{100 * (point.accuracy - base):+.2f}"),
                tables.count(point.size),
                tables.rate(point.speed),
            ],
        }
        for point in _points(runs)
    ]


def _classes(runs: Sequence[Named]) -> list[dict[str, Any]]:
    """Return the F1 score of each class by the last network of each run, and its change."""
    tests = [each.last.test.per_class for each in runs]
    rows = []
    for scores in zip(*tests, strict=True):
        first, *others = scores
        cells = [percent(first.f1)]
        for other in others:
            change = tables.minus(f"{100 * (other.f1 - first.f1):+.2f}")
            cells += [percent(other.f1), change]
        rows.append({"name": first.name, "cells": cells})
    return rows


def _changes(first: Named, other: Named) -> list[str]:
    """Return the confusions that changed most, such as 'cat taken for dog: 61 to 75 (+14)'."""
    names = [each.name for each in first.last.test.per_class]
    before, after = (np.asarray(each.last.test.confusion_matrix) for each in (first, other))
    change = after - before
    np.fill_diagonal(change, 0)
    order = np.argsort(-np.abs(change), axis=None, kind="stable")[:MOST_CHANGED]
    return [
        f"{names[i]} taken for {names[j]}: {before[i, j]:,} to {after[i, j]:,} "
        f"({tables.minus(f'{change[i, j]:+,}')})"
        for i, j in zip(*np.unravel_index(order, change.shape), strict=True)
        if change[i, j]
    ]
