"""The figures of a report, as PNG bytes.

Each is 4.6 inches wide: legible on a phone, and two fit side by side on a desktop. pyplot is not
used, so there is no global state.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator, ScalarFormatter

from jaxqat.pipeline.report.samples import Samples
from jaxqat.pipeline.report.theme import Theme, themed, to_png
from jaxqat.pipeline.results import LayerResult, Scores, TensorDifferences, Tested

WIDTH = 4.6  # Inches.
PATH_LENGTH = 36  # Letters of a line; fits stage2/block0/shortcut_conv/output.
ROW = 0.19  # Inches of a row with a name of one line.
MARKERS = "osD^vPX"
FILLS = ("none", "left", "right", "top")
MAX_COUNTED_CLASSES = 16  # With more, a count does not fit its cell.
MAX_NAMED_CLASSES = 30


def draw_samples(samples: Samples, theme: Theme) -> bytes:
    """Draw samples of several classes with their true labels (the paper's Fig. 2), five per row.

    Of images that are not RGB, the first channel is shown.
    """
    images, labels = samples.images[samples.samples], samples.labels[samples.samples]
    shown = len(images)
    columns = min(shown, 5)
    rows = -(-shown // columns)
    with themed(theme):
        figure = Figure(figsize=(WIDTH, 1.12 * WIDTH / columns * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, label in zip(grid.flat, images, labels, strict=False):
            pixels = image if image.shape[-1] == 3 else image[..., 0]
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            name = shorten(samples.class_names[int(label)])
            axes.set_title(name, fontsize=8, fontweight="normal", pad=3)
        return to_png(figure, has_photos=True)


def draw_curves(
    title: str, epochs: Sequence[Mapping[str, Any]], test: Scores | None, theme: Theme
) -> bytes:
    """Draw accuracy and loss of one stage by epoch (the paper's Figs. 3 and 5).

    Args:
        title: Name of the stage.
        epochs: Lines of metrics.jsonl. Epochs with frozen ranges are shaded.
        test: The stage's scores on the test split, marked at the last epoch. They have no curve,
            as the test split is not used during training.
        theme: Colours.
    """
    with themed(theme):
        figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
        accuracy, loss = figure.subplots(2, 1, sharex=True)
        _draw_curve(accuracy, "accuracy", epochs, test, 100.0, theme)
        _draw_curve(loss, "loss", epochs, test, 1.0, theme)
        accuracy.set_title(title, loc="left")
        accuracy.set_ylabel("Accuracy (%)")
        loss.set_ylabel("Cross-entropy (nats)")
        loss.set_xlabel("Epoch")
        loss.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
        loss.set_xlim(first - 0.5, last + 0.5)
        handles, labels = accuracy.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(labels),
            fontsize=8,
            columnspacing=1.2,
            handlelength=1.4,
        )
        return to_png(figure)


def _draw_curve(
    axes: Axes,
    score: str,
    epochs: Sequence[Mapping[str, Any]],
    test: Scores | None,
    scale: float,
    theme: Theme,
) -> None:
    x = [record["epoch"] for record in epochs]
    for key, label, color in (
        (score, "train", theme.train),
        (f"validation_{score}", "validation", theme.validation),
    ):
        y = scale * np.array([record.get(key) for record in epochs], np.float64)  # None is nan.
        if np.isfinite(y).any():
            # Markers show the points of a short line; on a long one they overlap.
            axes.plot(x, y, color=color, label=label, marker="o" if len(x) <= 30 else "")
    if test is not None:
        marker = {"marker": "D", "color": theme.test, "linestyle": "none", "markersize": 5}
        marker["clip_on"] = False  # It may lie on the edge.
        axes.plot(
            x[-1:], [scale * getattr(test, score)], label="test, read once", zorder=3, **marker
        )
    frozen = [record["epoch"] for record in epochs if record.get("frozen")]
    if frozen:
        span = (min(frozen) - 0.5, max(frozen) + 0.5)
        axes.axvspan(
            *span, color=theme.grid, alpha=0.8, linewidth=0, label="ranges, batch norm frozen"
        )


def draw_confusion(
    title: str, matrix: Sequence[Sequence[int]], class_names: Sequence[str], theme: Theme
) -> bytes:
    """Draw a confusion matrix (the paper's Figs. 4 and 6).

    Colour is the share of the true class, on a square-root scale that makes rare errors visible.
    Up to 16 classes have counts, more a colour bar; up to 30 have names, more their indices.
    """
    counts = np.asarray(matrix, np.int64)
    k = len(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with themed(theme):
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
        axes = figure.subplots()
        colors = LinearSegmentedColormap.from_list("share", [theme.surface, theme.strongest])
        image = axes.imshow(share, cmap=colors, norm=PowerNorm(0.5, 0, 1))
        axes.set_title(title, loc="left")
        axes.grid(False)
        name_classes(axes, class_names)
        if k <= MAX_COUNTED_CLASSES:
            _write_counts(axes, counts, share, theme)
        else:
            bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=40)
            bar.set_label("Share of the true class")
            bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return to_png(figure)


def name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    """Name the rows and columns of a confusion matrix; more than 30 classes by their indices."""
    k = len(class_names)
    if k <= MAX_NAMED_CLASSES:
        names = [shorten(name) for name in class_names]
        size = min(8.0, 130 / k)
        axes.set_xticks(range(k), names, rotation=90, fontsize=size)
        axes.set_yticks(range(k), names, fontsize=size)
        axes.set(xlabel="Predicted class", ylabel="True class")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set(xlabel="Predicted class (index)", ylabel="True class (index)")


def _write_counts(axes: Axes, counts: np.ndarray, share: np.ndarray, theme: Theme) -> None:
    digits = len(str(counts.max()))
    # The matrix is about 3.6 inches of 72 points wide; a digit's width is 0.64 of its size.
    size = min(8.0, 0.85 * 3.6 * 72 / len(counts) / (0.64 * max(digits, 2)))
    for (row, column), count in np.ndenumerate(counts):
        color = theme.on_strongest if share[row, column] > 0.3 else theme.ink
        axes.text(
            column,
            row,
            str(count),
            ha="center",
            va="center",
            fontsize=size,
            color=color if count else theme.muted,
        )


def draw_f1(networks: Sequence[Tested], theme: Theme) -> bytes:
    """Draw the F1 score of every class as bars, one for each network.

    With more than 30 classes, the 30 are drawn that the last network knows least.
    """
    classes = sorted(
        range(len(networks[0].test.per_class)),
        key=lambda i: networks[-1].test.per_class[i].f1,
    )[:MAX_NAMED_CLASSES]
    classes.sort()
    colors = (theme.train, theme.validation, theme.muted)
    bar = 0.8 / len(networks)
    with themed(theme):
        # A bar is at least 0.07 inches high.
        height = 1.1 + len(classes) * max(ROW, 0.09 * len(networks))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for place, (_, name, test) in enumerate(networks):
            scores = [100 * test.per_class[i].f1 for i in classes]
            rows = np.arange(len(classes)) + (place - (len(networks) - 1) / 2) * bar
            axes.barh(rows, scores, bar, color=colors[place % len(colors)], label=name)
        names = [shorten(networks[0].test.per_class[i].name, PATH_LENGTH) for i in classes]
        axes.set_yticks(range(len(classes)), names, fontsize=8)
        axes.set_ylim(len(classes) - 0.5, -0.5)
        axes.set(xlim=(0, 100), xlabel="F1 (%)")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=1, fontsize=8, handlelength=1.4)
        return to_png(figure)


def draw_sizes(
    networks: Sequence[tuple[str, int, float]],
    theme: Theme,
    *,
    styles: Sequence[tuple[int, int]] | None = None,
) -> bytes:
    """Draw the accuracy of networks against the bytes of their weights.

    Args:
        networks: Name, bytes and accuracy of each.
        theme: Colours.
        styles: As for `draw_accuracies`.
    """
    in_bytes = EngFormatter("B")  # The theme does not parse formulas.
    return draw_accuracies(networks, "Weights (bytes)", theme, formatter=in_bytes, styles=styles)


def draw_accuracies(
    networks: Sequence[tuple[str, float, float]],
    cost: str,
    theme: Theme,
    *,
    formatter: Formatter | None = None,
    styles: Sequence[tuple[int, int]] | None = None,
) -> bytes:
    """Draw the accuracy of networks against what they cost.

    Args:
        networks: Name, cost and accuracy of each.
        cost: What it is, with its unit.
        theme: Colours.
        formatter: Of the costs.
        styles: Number of the colour and of the marker of each; by default, all differ. Where the
            colours begin again, markers are half filled.
    """
    colors = (theme.test, theme.train, theme.validation, theme.muted)
    styles = [(place, place) for place in range(len(networks))] if styles is None else styles
    with themed(theme):
        figure = Figure(figsize=(WIDTH, 3.0 + ROW * len(networks)), layout="constrained")
        axes = figure.subplots()
        for (name, value, accuracy), (color, marker) in zip(networks, styles, strict=True):
            (point,) = axes.plot([value], [100 * accuracy], MARKERS[marker % len(MARKERS)])
            again, place = divmod(color, len(colors))
            point.set(label=name, color=colors[place], clip_on=False)
            # Hollow, so that one under another is seen.
            point.set(markersize=7, markeredgewidth=1.5, markerfacecoloralt="none")
            point.set(fillstyle=FILLS[again % len(FILLS)])
        axes.set_xlim(0, 1.08 * max(value for _, value, _ in networks))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if formatter is not None:
            axes.xaxis.set_major_formatter(formatter)
        # At least two points high, so that a small difference looks small.
        scores = [100 * accuracy for _, _, accuracy in networks]
        margin = max(1.0, 0.2 * (max(scores) - min(scores)))
        axes.set_ylim(min(scores) - margin, max(scores) + margin)
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.set(xlabel=cost, ylabel="Accuracy (%)")
        figure.legend(loc="outside lower center", ncols=1, fontsize=8, handlelength=1.4)
        return to_png(figure)


def draw_ranges(layers: Sequence[LayerResult], theme: Theme) -> bytes:
    """Draw smallest to largest weight and activation of every layer, in the network's order."""
    with themed(theme):
        figure, panels = rows_figure([layer.path for layer in layers], 2, margin=1.1)
        for axes, low, high, label, color in (
            (panels[0], "weight_min", "weight_max", "Weights\n(value)", theme.train),
            (panels[1], "act_min", "act_max", "Activations\n(value)", theme.validation),
        ):
            for index, layer in enumerate(layers):
                if getattr(layer, low) is not None:
                    ends = getattr(layer, low), getattr(layer, high)
                    axes.hlines(index, *ends, color=color, linewidth=3.5)
            axes.axvline(0, color=theme.muted, linewidth=0.8)
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(3))
        return to_png(figure)


def draw_errors(tensors: Sequence[TensorDifferences], theme: Theme) -> bytes:
    """Draw the signal to quantization noise of every tensor, in the network's order."""
    with themed(theme):
        figure, (axes,) = rows_figure([tensor.name for tensor in tensors], 1, margin=0.9)
        known = [(i, t.sqnr_db) for i, t in enumerate(tensors) if t.sqnr_db is not None]
        rows, values = zip(*known, strict=True)
        axes.hlines(rows, min(0, *values), values, color=theme.grid, linewidth=1.2)
        axes.plot(values, rows, color=theme.train, marker="o", markersize=4.5, linestyle="none")
        axes.set_xlabel("Signal to quantization noise (dB)")
        axes.set_xlim(left=min(0, *values))
        return to_png(figure)


def rows_figure(names: Sequence[str], columns: int, *, margin: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels that share rows with the names of layers or tensors, uncut.

    Args:
        names: Paths of layers, or names of tensors.
        columns: Number of panels.
        margin: Inches for what is above and below the rows.
    """
    labels = [wrap_path(name) for name in names]
    lines = max([1 + label.count("\n") for label in labels] or [1])
    # A second line of 7 points takes 0.12 inches.
    height = margin + (ROW + 0.12 * (lines - 1)) * len(names)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False, sharey=True).flat)
    for axes in panels:
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), labels, fontsize=7)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, panels


def wrap_path(path: str, length: int = PATH_LENGTH) -> str:
    """Return a path in lines of at most `length` letters, broken behind '/' where possible."""
    lines = [""]
    for part in re.findall(r"[^/]*/|[^/]+", path):
        for piece in (part[i : i + length] for i in range(0, len(part), length)):
            if len(lines[-1]) + len(piece) > length:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)


def shorten(name: str, length: int = 13) -> str:
    """Return a name of at most `length` letters; a longer one ends in '…'."""
    return name if len(name) <= length else f"{name[: length - 1]}…"
