"""The page of an analysis: which layers cost what, and how their inputs lie in their ranges."""

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
    """Draws FOLDER/analysis.html.

    Args:
        folder: Where to write it.
        analysis: The fields of an `Analysis` as plain data, with the name, stage, split and step of
            what was analyzed.

    Returns:
        The page: one file that needs nothing else, no network and no script.

    Raises:
        ReportError: If it cannot be written.
    """
    worst = worst_tensors(analysis)
    drawings: dict[str, Callable[..., bytes]] = {
        "sensitivity": partial(figures.draw_sensitivity, analysis),
        "noise": partial(figures.draw_noise, analysis),
        "histograms": partial(figures.draw_histograms, worst),
    }
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
    """The inputs of the most sensitive layers, each once."""
    tensors = {tensor["name"]: tensor for tensor in analysis["tensors"]}
    ranked = [row["path"] for row in analysis["sensitivity"]]
    layers = sorted(analysis["layers"], key=lambda layer: ranked.index(layer["path"]))
    names = list(dict.fromkeys(layer["input"] for layer in layers if layer["input"]))
    return [tensors[name] for name in names[:MAX_HISTOGRAMS]]


def _headline(analysis: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that a reader came for."""
    real, quantized = analysis["real"], analysis["quantized"]
    numbers = []
    if real["accuracy"] is not None:
        numbers.append((f"{percent(real['accuracy'])} %", "accuracy in float"))
        numbers.append((f"{percent(quantized['accuracy'])} %", "accuracy quantized"))
    if quantized["agreement"] is not None:
        numbers.append((f"{percent(quantized['agreement'])} %", "of the classes agree"))
    return [*numbers, (f"{decibels(quantized['sqnr_db'])} dB", "SQNR of the result")]


def _layers(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every layer with its noise and what it costs, the most sensitive first."""
    tensors = {tensor["name"]: tensor for tensor in analysis["tensors"]}
    rows = []
    for row in analysis["sensitivity"]:
        effects = [cell for way in ("alone", "without") for cell in _effect(row[way])]
        for layer in (each for each in analysis["layers"] if each["path"] == row["path"]):
            read = tensors.get(layer["input"])  # None where each example has its own range.
            ratios = (layer["weight_sqnr_db"], read and read["sqnr_db"], layer["output_sqnr_db"])
            bits = f"{layer['weight_bits']} / {layer['act_bits'] or DASH}"
            cells = [bits, *map(decibels, ratios), *_extents(read)]
            rows.append({"path": layer["path"], "cells": [*cells, *effects]})
    return rows


def _extents(read: Mapping[str, Any] | None) -> list[str]:
    """What a tensor's values span, its range, and how much of it is clipped."""
    if read is None:
        return [DASH] * 3
    spans = (("smallest", "largest"), ("low", "high"))
    told = [minus(f"{read[low]:.3g} … {read[high]:.3g}") for low, high in spans]
    return [*told, percent(read["clipped"])]


def _effect(effect: Mapping[str, Any]) -> list[str]:
    """Noise, and the share of the classes that agree or are right."""
    shares = [effect["agreement"], effect["accuracy"]]
    return [decibels(effect["sqnr_db"]), *(DASH if s is None else percent(s) for s in shares)]
