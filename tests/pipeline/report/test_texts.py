"""The texts of figures: inside the figure, and none over another."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from pipeline.report.made_up import CIFAR10, layer, records, scores, tensor
from pipeline.report.made_up import analysis as made_up

from jaxqat.pipeline import results
from jaxqat.pipeline.report import figures, layer_figures
from jaxqat.pipeline.report.theme import LIGHT, themed

LONG = [f"encoder/stage{i}/block12/attention/shortcut_projection" for i in range(4)]
TEST = scores(CIFAR10, 0.9, seed=0)
NAMES = ("FP32", "PTQ W4A8 (w4a8), integer", "QAT W8A8, quantized", "QAT W8A8, integer")
TESTED = [results.Tested(name, name, TEST) for name in NAMES]
FOUND = made_up(4)
LONG_ANALYSIS = replace(
    FOUND,
    layers=tuple(replace(each, path=p) for each, p in zip(FOUND.layers, LONG, strict=True)),
    sensitivity=tuple(
        replace(each, path=p) for each, p in zip(FOUND.sensitivity, LONG, strict=True)
    ),
    tensors=tuple(replace(t, name=f"{p}/input") for t, p in zip(FOUND.tensors, LONG, strict=False)),
)
WIDE = {"weight_min": -123.4, "weight_max": 98.7, "act_min": -1234.5, "act_max": 5678.9}
DRAWINGS = {
    "curves": partial(figures.draw_curves, "QAT", [*records("qat", 30, frozen=6)], TEST),
    "one_epoch": partial(figures.draw_curves, "QAT", [*records("qat", 1)], TEST),
    "confusion": partial(figures.draw_confusion, "QAT", TEST.confusion_matrix, CIFAR10),
    "f1": partial(figures.draw_f1, [TESTED[0], TESTED[3]]),
    "f1_of_four": partial(figures.draw_f1, TESTED),
    "sizes": partial(
        figures.draw_sizes, [(n, 10**6 // (i + 1), 0.9 + i / 1e4) for i, n in enumerate(NAMES)]
    ),
    "ranges": partial(figures.draw_ranges, [layer(f"stage1/conv{i}") for i in range(20)]),
    "long_ranges": partial(figures.draw_ranges, [layer(path, **WIDE) for path in LONG]),
    "errors": partial(figures.draw_errors, [tensor(path, 40.0) for path in LONG]),
    "noise": partial(layer_figures.draw_noise, LONG_ANALYSIS),
    "sensitivity": partial(layer_figures.draw_sensitivity, LONG_ANALYSIS),
    "histograms": partial(layer_figures.draw_histograms, LONG_ANALYSIS.tensors),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_text_is_cut_or_lies_over_another(name, monkeypatch):
    drawn: list[Figure] = []
    for module in (figures, layer_figures):
        monkeypatch.setattr(module, "to_png", lambda figure, **_: drawn.append(figure) or b"")
    DRAWINGS[name](LIGHT)
    (figure,) = drawn
    with themed(LIGHT):
        figure.draw_without_rendering()
        boxes = {text: text.get_window_extent() for text in _texts(figure)}
    width, height = figure.bbox.size
    # A text may touch the edge; sizes of letters are known to a pixel.
    cut = [
        text.get_text()
        for text, box in boxes.items()
        if not (box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1)
    ]
    over = [
        (a.get_text(), b.get_text())
        for (a, first), (b, second) in itertools.combinations(boxes.items(), 2)
        if min(first.x1, second.x1) - max(first.x0, second.x0) > 1
        and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
    ]
    assert len(boxes) > 5
    assert (cut, over) == ([], [])


def _texts(figure: Figure) -> list[Text]:
    """Return the texts that are drawn: an axis keeps labels of ticks beyond its ends."""
    hidden: set[Text] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high or not tick.get_visible():
                hidden |= {tick.label1, tick.label2}
    found = (each for each in figure.findobj(Text) if isinstance(each, Text))
    return [t for t in found if t.get_visible() and t.get_text().strip() and t not in hidden]
