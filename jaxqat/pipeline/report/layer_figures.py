"""The figures of the page that `jaxqat analyze` writes, as PNG bytes; like those in `figures`."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxqat.analysis.result import Effect, TensorAnalysis
from jaxqat.pipeline.measurements import RunAnalysis
from jaxqat.pipeline.report.figures import WIDTH, rows_figure, wrap_path
from jaxqat.pipeline.report.theme import Theme, themed, to_png

Score = Callable[[Effect], float | None]

NAME_LENGTH = 26  # Letters of a line above a histogram.


def draw_noise(analysis: RunAnalysis, theme: Theme) -> bytes:
    """Draw the signal to quantization noise of every layer's weights, input and output, in order.

    An input has no dot if it has no static range: its range is dynamic, or, as in an embedding, its
    values are integers.
    """
    ratios = {tensor.name: tensor.sqnr_db for tensor in analysis.tensors}
    layers = analysis.layers
    series = {
        "weights": ([layer.weight_sqnr_db for layer in layers], "s", theme.train),
        "input": ([ratios.get(layer.input or "") for layer in layers], "o", theme.validation),
        "output": ([layer.output_sqnr_db for layer in layers], "D", theme.test),
    }
    with themed(theme):
        figure, (axes,) = rows_figure([layer.path for layer in layers], 1, margin=1.3)
        for label, (values, marker, color) in series.items():
            _dots(axes, values, label, marker, color)
        axes.set_xlabel("Signal to quantization noise (dB)")
        _legend(figure, axes)
        return to_png(figure)


def draw_sensitivity(analysis: RunAnalysis, theme: Theme) -> bytes:
    """Draw the result with each layer alone quantized or in float; the most sensitive on top."""
    rows = analysis.sensitivity
    scores: dict[str, Score] = {"SQNR of the\nresult (dB)": lambda effect: effect.sqnr_db}
    if analysis.real.accuracy is not None:
        scores["Accuracy (%)"] = _accuracy_percent
    with themed(theme):
        figure, panels = rows_figure([row.path for row in rows], len(scores), margin=1.3)
        for axes, (label, score) in zip(panels, scores.items(), strict=True):
            _draw_effects(axes, analysis, score, theme)
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(3))
        _legend(figure, panels[0])
        return to_png(figure)


def _accuracy_percent(effect: Effect) -> float | None:
    return None if effect.accuracy is None else 100 * effect.accuracy


def _draw_effects(axes: Axes, analysis: RunAnalysis, score: Score, theme: Theme) -> None:
    rows, everything = analysis.sensitivity, score(analysis.quantized)
    alone, without = [score(row.alone) for row in rows], [score(row.without) for row in rows]
    _dots(axes, alone, "quantized alone", "o", theme.validation)
    _dots(axes, without, "alone in float", "D", theme.train)
    if everything is not None:
        line = {"color": theme.muted, "linewidth": 0.9, "linestyle": "--"}
        axes.axvline(everything, label="all quantized", **line)


def draw_histograms(tensors: Sequence[TensorAnalysis], theme: Theme) -> bytes:
    """Draw histograms of tensors and their ranges, two per row, on a log scale.

    Args:
        tensors: Entries of the analysis's `tensors`, at least one.
        theme: Colours of the figure.
    """
    rows = -(-len(tensors) // 2)
    with themed(theme):
        figure = Figure(figsize=(WIDTH, 0.4 + 1.5 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes in grid.flat[len(tensors) :]:
            axes.set_axis_off()
        for axes, tensor in zip(grid.flat, tensors, strict=False):
            _draw_histogram(axes, tensor, theme)
        figure.supylabel("Values", fontsize=9)
        return to_png(figure)


def _draw_histogram(axes: Axes, tensor: TensorAnalysis, theme: Theme) -> None:
    counts, edges = np.asarray(tensor.counts), np.asarray(tensor.edges)
    used = np.flatnonzero(counts)
    ends = [tensor.low, tensor.high]
    middles = (edges[:-1] + edges[1:]) / 2
    inside = (middles > ends[0]) & (middles < ends[1])
    for where, color in ((inside, theme.train), (~inside, theme.validation)):
        axes.stairs(np.where(where, counts, 0), edges, fill=True, color=color)
    for end in ends:
        axes.axvline(end, color=theme.ink, linewidth=0.9, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))  # The theme does not parse formulas.
    axes.set_ylim(bottom=0.5)
    first = float(min(edges[used[0]], ends[0]))
    last = float(max(edges[used[-1] + 1], ends[1]))
    margin = 0.03 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=7)
    clipped = f"{100 * tensor.clipped:.2f} % clipped"
    name = wrap_path(tensor.name, NAME_LENGTH)
    axes.set_title(f"{name}\n{clipped}", fontsize=7, fontweight="normal")


def _dots(axes: Axes, values: Sequence[float | None], label: str, marker: str, color: str) -> None:
    known = [(value, row) for row, value in enumerate(values) if value is not None]
    x, y = zip(*known, strict=True) if known else ((), ())
    axes.plot(x, y, color=color, marker=marker, markersize=4, linestyle="none", label=label)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": len(labels), "fontsize": 8}
    figure.legend(handles, labels, columnspacing=1.2, handlelength=1.4, **place)
