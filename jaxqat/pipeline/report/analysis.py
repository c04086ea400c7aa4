"""The page of `jaxqat analyze`: which layers cost accuracy, and how well ranges fit inputs."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxqat.analysis._text import decibels, percent
from jaxqat.analysis.result import Effect, LayerAnalysis, Sensitivity, TensorAnalysis
from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline.measurements import RunAnalysis
from jaxqat.pipeline.report import layer_figures as figures
from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.html import ANALYSIS_PAGE, draw_all, template
from jaxqat.pipeline.report.tables import DASH, count, minus

MAX_HISTOGRAMS = 6


def write_analysis(folder: Path, analysis: RunAnalysis) -> Path:
    """Write FOLDER/analysis.html.

    Args:
        folder: Where to write the page.
        analysis: The content of FOLDER/analysis.json.

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
        labelled=analysis.real.accuracy is not None,
        layers=_layers(analysis),
        worst=len(worst),
        examples=count(analysis.examples),
    )
    path = Path(folder) / ANALYSIS_PAGE
    write_atomically(path, page, error=ReportError)
    return path


def worst_tensors(analysis: RunAnalysis) -> list[TensorAnalysis]:
    """Return the inputs of the most sensitive layers, each once, if they have static ranges."""
    tensors = {tensor.name: tensor for tensor in analysis.tensors}
    inputs = (layer.input for _, layer in _ranked(analysis))
    names = dict.fromkeys(name for name in inputs if name in tensors)
    return [tensors[name] for name in names][:MAX_HISTOGRAMS]


def _ranked(analysis: RunAnalysis) -> Iterator[tuple[Sensitivity, LayerAnalysis]]:
    """Return each layer and its sensitivity, the most sensitive first."""
    for sensitivity in analysis.sensitivity:
        for layer in analysis.layers:
            if layer.path == sensitivity.path:
                yield sensitivity, layer


def _headline(analysis: RunAnalysis) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page, each with what it is."""
    real, quantized = analysis.real, analysis.quantized
    numbers = []
    if real.accuracy is not None:
        numbers.append((f"{percent(real.accuracy)} %", "accuracy in float"))
        numbers.append((f"{percent(quantized.accuracy)} %", "accuracy quantized"))
    if quantized.agreement is not None:
        numbers.append((f"{percent(quantized.agreement)} %", "of the classes agree"))
    return [*numbers, (f"{decibels(quantized.sqnr_db)} dB", "SQNR of the result")]


def _layers(analysis: RunAnalysis) -> list[dict[str, Any]]:
    """Return a row for each layer, the most sensitive first: noise, input range and effects."""
    tensors = {tensor.name: tensor for tensor in analysis.tensors}
    rows = []
    for sensitivity, layer in _ranked(analysis):
        read = tensors.get(layer.input or "")  # None without a static range.
        effects = [*_effect(sensitivity.alone), *_effect(sensitivity.without)]
        rows.append(
            {"path": layer.path, "cells": [*_noise(layer, read), *_extents(read), *effects]}
        )
    return rows


def _noise(layer: LayerAnalysis, read: TensorAnalysis | None) -> list[str]:
    """Return the bits of a layer, and the noise of its weights, input and output, as text."""
    ratios = (layer.weight_sqnr_db, read and read.sqnr_db, layer.output_sqnr_db)
    return [f"{layer.weight_bits} / {layer.act_bits or DASH}", *map(decibels, ratios)]


def _extents(read: TensorAnalysis | None) -> list[str]:
    """Return extent of a tensor's values, its range, and the share that is clipped, as text."""
    if read is None:
        return [DASH] * 3
    spans = ((read.smallest, read.largest), (read.low, read.high))
    texts = [minus(f"{low:.3g} … {high:.3g}") for low, high in spans]
    return [*texts, percent(read.clipped)]


def _effect(effect: Effect) -> list[str]:
    """Return noise of the result, and shares of agreeing and of correct classes, as text."""
    return [decibels(effect.sqnr_db), percent(effect.agreement), percent(effect.accuracy)]
