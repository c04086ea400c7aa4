import io
from collections.abc import Sequence
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from pipeline.report.made_up import layer, scores, tensor

from jaxqat.pipeline import results
from jaxqat.pipeline.report.figures import (
    draw_confusion,
    draw_curves,
    draw_errors,
    draw_f1,
    draw_ranges,
    draw_samples,
    draw_sizes,
    rows_figure,
    wrap_path,
)
from jaxqat.pipeline.report.samples import Samples, choose_samples
from jaxqat.pipeline.report.theme import DARK, LIGHT

WIDTH_PIXELS = 920  # 4.6 inches at 200 dots per inch.
THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def is_color(image: np.ndarray, color: str, tolerance: int = 1) -> np.ndarray:
    return np.all(abs(image - 255 * np.array(to_rgb(color))) <= tolerance, axis=-1)


def chosen(images: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Samples:
    return choose_samples(images, labels, names, {"FP32": np.zeros((len(labels), len(names)))})


def epochs(n: int, frozen: int = 0) -> list[dict]:
    return [
        {
            "epoch": i,
            "loss": 1 / i,
            "accuracy": 1 - 0.5 / i,
            "validation_loss": None,
            "frozen": i > n - frozen,
        }
        for i in range(1, n + 1)
    ]


@THEMES
def test_background_is_the_themes_and_width_fits_a_phone(theme):
    samples = chosen(np.zeros((7, 8, 8, 3), np.uint8), np.arange(7), "abcdefg")
    tested = results.Tested("fp32", "FP32", scores("ab", 0.9, seed=0))
    for png in (
        draw_samples(samples, theme),
        draw_curves("FP32", epochs(3), None, theme),
        draw_confusion("FP32", [[3, 1], [0, 2]], ["a", "b"], theme),
        draw_ranges([layer()], theme),
        draw_errors([tensor("a", 40.0)], theme),
        draw_f1([tested], theme),
        draw_sizes([("FP32", 400, 0.9), ("integer", 100, 0.9)], theme),
    ):
        image = pixels(png)
        assert image.shape[1] == WIDTH_PIXELS
        assert is_color(image[:3], theme.surface).all()


def shaded_width(n: int, frozen: int) -> int:
    image = pixels(draw_curves("QAT", epochs(n, frozen), None, LIGHT))
    shade = 0.8 * 255 * np.array(to_rgb(LIGHT.grid)) + 0.2 * 255
    # Shade and grid lines below it are within 8; white is 25 away.
    shaded = np.all(abs(image - shade) <= 8, axis=-1)[: len(image) // 2]  # The legend is below.
    # Squares of 8 pixels: grid lines outside are as dark as the shade, but thinner.
    squares = np.lib.stride_tricks.sliding_window_view(shaded, (8, 8)).all((2, 3))
    columns = np.flatnonzero(squares.any(0))
    return int(columns.max() - columns.min() + 8) if columns.size else 0


def test_shading_covers_exactly_the_frozen_epochs():
    assert shaded_width(10, frozen=0) == 0
    # The legend, and with it the axes, are the same for both; an edge is sharp to a pixel.
    assert abs(shaded_width(10, frozen=6) - 2 * shaded_width(10, frozen=3)) <= 3


@pytest.mark.parametrize("test", [None, scores("ab", 0.9, seed=0)], ids=["no_test", "test"])
def test_single_epoch_without_validation_is_a_visible_point(test):
    image = pixels(draw_curves("FP32", epochs(1), test, LIGHT))

    # A marker of 3.5 points is 9.7 pixels across, 74 in area, less its smoothed edge.
    for half in np.array_split(image[: int(0.85 * len(image))], 2):
        assert is_color(half, LIGHT.train).sum() >= 40
    assert not is_color(image, LIGHT.validation).any()


def test_missing_scores_are_a_gap_and_not_zero():
    lines = epochs(3)
    lines[1]["loss"] = None
    draw_curves("FP32", lines, None, LIGHT)

    lines = [line | {"loss": None, "accuracy": None} for line in lines]
    assert not is_color(pixels(draw_curves("FP32", lines, None, LIGHT)), LIGHT.train).any()


@THEMES
def test_perfect_confusion_matrix_is_a_full_diagonal(theme):
    k = 40  # No counts are written over the cells.
    image = pixels(
        draw_confusion("FP32", np.diag([5] * k).tolist(), [str(i) for i in range(k)], theme)
    )
    full = is_color(image[: int(0.75 * len(image))], theme.strongest, tolerance=2)
    rows, columns = np.nonzero(full)

    assert abs(np.corrcoef(rows, columns)[0, 1] - 1) < 1e-3
    # 40 of 1,600 cells: a cell's edge is drawn to the pixel, and cells are 16 pixels wide.
    side = rows.max() - rows.min() + 1
    assert full.sum() / side**2 == pytest.approx(1 / k, rel=2 / 16)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("k", [1, 2, 10, 16, 17, 31, 100, 1000])
def test_confusion_matrix_of_any_number_of_classes_is_drawn(k):
    matrix = np.zeros((k, k), int)
    matrix[0] = 123456  # All other classes have no images.
    png = draw_confusion(
        "FP32", matrix.tolist(), [f"a long class name {i}" for i in range(k)], DARK
    )

    assert pixels(png).shape == (WIDTH_PIXELS, WIDTH_PIXELS, 3)


def test_dollar_signs_in_names_are_not_formulas():
    names = ["$", "$\\frac$"]
    plain = draw_confusion("FP32", [[1, 0], [0, 1]], names, LIGHT)
    images = np.zeros((2, 2, 2, 3), np.uint8)
    draw_samples(chosen(images, np.arange(2), names), LIGHT)
    tested = results.Tested("fp32", "$\\frac$", scores(names, 0.9, seed=0))
    draw_f1([tested], LIGHT)
    draw_sizes([("$\\frac$", 4, 0.9), ("$", 1, 0.9)], LIGHT)

    assert plain != draw_confusion("FP32", [[1, 0], [0, 1]], ["", ""], LIGHT)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("m", [1, 4, 20, 500])
def test_samples_show_the_pixels_of_their_images(m, channels):
    images = np.full((m, 4, 6, channels), 77, np.uint8)
    samples = chosen(images, np.zeros(m, int), "a")
    image = pixels(draw_samples(samples, LIGHT))
    shown = (abs(image - 77) <= 1).all(-1)

    # Five columns of wide images in rows almost square: each covers well over half its cell,
    # and twenty are the most that are shown.
    assert shown.mean() > 0.45
    assert len(image) <= 4 * WIDTH_PIXELS / 5 * 1.15 or m < 5


def test_unknown_ranges_are_left_blank():
    layers = [layer(act_min=None, act_max=None)] * 3
    image = pixels(draw_ranges(layers, LIGHT))

    assert is_color(image, LIGHT.train).any()
    assert not is_color(image, LIGHT.validation).any()


def points(*decibels: float | None) -> list[tuple[float, float]]:
    """Centre (row, column) of each point of the figure of errors, from above."""
    tensors = [tensor("same", value) for value in decibels]
    image = pixels(draw_errors(tensors, LIGHT))
    colored = is_color(image, LIGHT.train)
    rows = np.flatnonzero(colored.any(1))
    groups = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    centres = [np.argwhere(colored[g[0] : g[-1] + 1]).mean(0) for g in groups]
    return [(y + g[0], x) for (y, x), g in zip(centres, groups, strict=True)]


def test_errors_are_in_the_networks_order_at_their_decibels():
    (_, a), (_, b), (_, c) = found = points(10.0, 20.0, 40.0)

    assert [row for row, _ in found] == sorted(row for row, _ in found)
    # Centres of points of 12 pixels are known to a pixel.
    assert abs((c - b) - 2 * (b - a)) <= 3


def test_unknown_errors_are_left_blank_and_noise_above_the_signal_is_shown():
    assert len(points(None, 30.0, None)) == 1
    assert len(points(-3.0, 30.0)) == 2


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("stage2/block0/shortcut_conv/output", ["stage2/block0/shortcut_conv/output"]),
        ("a" * 30 + "/" + "b" * 30 + "/c", ["a" * 30 + "/", "b" * 30 + "/c"]),
        ("x" * 80, ["x" * 36, "x" * 36, "x" * 8]),
        ("/a//b", ["/a//b"]),
    ],
)
def test_a_long_name_is_wrapped_and_never_cut(path, lines):
    assert wrap_path(path) == "\n".join(lines)
    figure, (axes,) = rows_figure([path], 1, margin=1.0)
    figure.draw_without_rendering()
    (label,) = axes.get_yticklabels()
    box, (width, height) = label.get_window_extent(), figure.bbox.size
    assert label.get_text().replace("\n", "") == path
    assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height


def test_bars_of_f1_are_as_long_as_the_scores():
    test = scores("ab", 0.9, seed=0)

    def bars(*values: float) -> tuple[int, int]:
        """Longest run of each bar's colour, in pixels."""
        tested = [
            results.Tested(
                name, name, replace(test, per_class=[replace(c, f1=value) for c in test.per_class])
            )
            for name, value in zip("xy", values, strict=True)
        ]
        image = pixels(draw_f1(tested, LIGHT))[:100]  # Above the legend.
        first, second = (
            int(is_color(image, c).sum(1).max()) for c in (LIGHT.train, LIGHT.validation)
        )
        return first, second

    first, second = bars(0.8, 0.4)
    # The ends of bars are known to a pixel.
    assert abs(first - 2 * second) <= 3 and second > 100


def test_of_many_classes_the_least_known_have_bars():
    names = [f"class {i}" for i in range(100)]
    test = scores(names, 0.9, seed=0)
    perfect = tuple(replace(each, f1=1.0) for each in test.per_class[30:])
    changed = [
        replace(test, per_class=(*test.per_class[:30], *rest))
        for rest in (perfect, [replace(each, f1=0.999) for each in perfect])
    ]
    drawn = [draw_f1([results.Tested("fp32", "FP32", each)], LIGHT) for each in changed]
    assert drawn[0] == drawn[1]


def test_figures_neither_use_nor_change_the_users_matplotlib_settings():
    plain = draw_curves("FP32", epochs(3), None, LIGHT)
    with matplotlib.rc_context({"axes.linewidth": 9, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert draw_curves("FP32", epochs(3), None, LIGHT) == plain
        assert dict(matplotlib.rcParams) == before


def test_a_network_in_a_color_that_was_had_before_looks_different():
    """The fifth run has the first one's color, and networks of one kind have one marker."""
    networks = [("first", 4, 0.9), ("fifth", 5, 0.8)]
    pages = {draw_sizes(networks, LIGHT, styles=[(0, 0), (place, 0)]) for place in (0, 4, 8)}
    assert len(pages) == 3
