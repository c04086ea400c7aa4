"""The page of `jaxqat analyze`: which layers cost accuracy, and how well ranges fit inputs."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline.report import layer_figures as figures
from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.html import draw_all, template
from jaxqat.pipeline.report.tables import DASH, count, decibels, minus, percent

ANALYSIS_PAGE = "analysis.html"
MAX_HISTOGRAMS = 6


def write_analysis(folder: Path, analysis: Mapping[str, Any]) -> Path:
    """Write FOLDER/analysis.html.

    Args:
        folder: Where to write the page.
        analysis: The fields of an `Analysis` as plain data, with the name, stage, split and step of
            what was analyzed.

    Returns:
        Path of the page: one file without scripts or links to other files.

    Raises:
        ReportError: If it cannot be written.
    """
    worst = worst_tensors(analysis)
    drawings: dict[str, Callable[..., bytes]] = {
        "sensitivity": partial(figures.draw_sensitivity, analysis),
        "noise": partial(figures.draw_noise, analysis),
    }
    if worst:  # With dynamic ranges alone, no tensor has one range to show.
        drawings["histograms"] = partial(figures.draw_histograms, worst)
    _, images = draw_all(drawings)
    page = template("analysis.html.j2").render(
        analysis=analysis,
        images=images,
        headline=_headline(analysis),
        labelled=analysis["real"]["accuracy"] is not None,
        layers=_layers(analysis),
        worst=len(worst),
        examples=count(analysis["examples"]),
    )
    path = Path(folder) / ANALYSIS_PAGE
    write_atomically(path, page, error=ReportError)
    return path


def worst_tensors(analysis: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the inputs of the most sensitive layers, each once, if they have static ranges."""
    tensors = {tensor["name"]: tensor for tensor in analysis["tensors"]}
    ranked = [row["path"] for row in analysis["sensitivity"]]
    layers = sorted(analysis["layers"], key=lambda layer: ranked.index(layer["path"]))
    names = list(dict.fromkeys(layer["input"] for layer in layers if layer["input"] in tensors))
    return [tensors[name] for name in names[:MAX_HISTOGRAMS]]


def _headline(analysis: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page, each with what it is."""
    real, quantized = analysis["real"], analysis["quantized"]
    numbers = []
    if real["accuracy"] is not None:
        numbers.append((f"{percent(real['accuracy'])} %", "accuracy in float"))
        numbers.append((f"{percent(quantized['accuracy'])} %", "accuracy quantized"))
    if quantized["agreement"] is not None:
        numbers.append((f"{percent(quantized['agreement'])} %", "of the classes agree"))
    return [*numbers, (f"{decibels(quantized['sqnr_db'])} dB", "SQNR of the result")]


def _layers(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each layer, the most sensitive first: noise, input range and effects."""
    tensors = {tensor["name"]: tensor for tensor in analysis["tensors"]}
    rows = []
    for row in analysis["sensitivity"]:
        effects = [cell for way in ("alone", "without") for cell in _effect(row[way])]
        for layer in (each for each in analysis["layers"] if each["path"] == row["path"]):
            read = tensors.get(layer["input"])  # None without a static range.
            ratios = (layer["weight_sqnr_db"], read and read["sqnr_db"], layer["output_sqnr_db"])
            bits = f"{layer['weight_bits']} / {layer['act_bits'] or DASH}"
            cells = [bits, *map(decibels, ratios), *_extents(read)]
            rows.append({"path": layer["path"], "cells": [*cells, *effects]})
    return rows


def _extents(read: Mapping[str, Any] | None) -> list[str]:
    """Return extent of a tensor's values, its range, and the share that is clipped, as text."""
    if read is None:
        return [DASH] * 3
    spans = (("smallest", "largest"), ("low", "high"))
    texts = [minus(f"{read[low]:.3g} … {read[high]:.3g}") for low, high in spans]
    return [*texts, percent(read["clipped"])]


def _effect(effect: Mapping[str, Any]) -> list[str]:
    """Return noise of the result, and shares of agreeing and of correct classes, as text."""
    shares = [effect["agreement"], effect["accuracy"]]
    return [decibels(effect["sqnr_db"]), *(DASH if s is None else percent(s) for s in shares)]
