"""The figures of a comparison of runs, as PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxqat.pipeline.report.figures import MARKERS, MAX_COUNTED_CLASSES, ROW, WIDTH, name_classes
from jaxqat.pipeline.report.theme import Theme, themed, to_png

STYLES = ("-", "--", "-.", ":")


def draw_overlaid(
    title: str, runs: Mapping[str, Sequence[Mapping[str, Any]]], theme: Theme
) -> bytes:
    """Draw training accuracy and loss of one stage by epoch, a line for each run.

    Args:
        title: Name of the stage.
        runs: Lines of metrics.jsonl of each run, by its name.
        theme: Colours.
    """
    colors = (theme.train, theme.validation, theme.muted, theme.test)
    with themed(theme):
        figure = Figure(figsize=(WIDTH, 4.3 + ROW * len(runs)), layout="constrained")
        accuracy, loss = figure.subplots(2, 1, sharex=True)
        for place, (name, epochs) in enumerate(runs.items()):
            x = [record["epoch"] for record in epochs]
            style: dict[str, Any] = {
                "color": colors[place % len(colors)],
                "linestyle": STYLES[place // len(colors) % len(STYLES)],
                "marker": MARKERS[place % len(MARKERS)] if len(x) <= 30 else "",
            }
            scores = [100 * record["accuracy"] for record in epochs]
            accuracy.plot(x, scores, label=name, **style)
            loss.plot(x, [record["loss"] for record in epochs], **style)
        accuracy.set_title(title, loc="left")
        accuracy.set_ylabel("Training accuracy (%)")
        loss.set_ylabel("Training loss (nats)")
        loss.set_xlabel("Epoch")
        loss.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.legend(loc="outside lower center", ncols=1, fontsize=8, handlelength=2.4)
        return to_png(figure)


def draw_confusion_change(
    title: str,
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    class_names: Sequence[str],
    theme: Theme,
) -> bytes:
    """Draw how many more or fewer images of a true class are put into each class.

    Args:
        title: Name of the second network.
        before: Confusion matrix of the first network.
        after: That of the second network, of the same images.
        class_names: Names of the classes.
        theme: Colours.
    """
    change = np.asarray(after, np.int64) - np.asarray(before, np.int64)
    largest = max(1, int(np.abs(change).max()))
    with themed(theme):
        figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
        axes = figure.subplots()
        ends = [theme.validation, theme.surface, theme.train]
        colors = LinearSegmentedColormap.from_list("change", ends)
        image = axes.imshow(change, cmap=colors, vmin=-largest, vmax=largest)
        axes.set_title(title, loc="left")
        axes.grid(False)
        name_classes(axes, class_names)
        if len(change) <= MAX_COUNTED_CLASSES:
            for (row, column), count in np.ndenumerate(change):
                text = f"{count:+d}".replace("-", "−") if count else ""
                strong = abs(count) > 0.6 * largest
                color = theme.on_strongest if strong else theme.ink
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        else:
            bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=40)
            bar.set_label("Change in images")
            bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return to_png(figure)
