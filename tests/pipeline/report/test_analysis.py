"""The page of an analysis, from made-up data."""

import base64
from dataclasses import replace

import pytest
from pipeline.report.made_up import analysis as made_up
from pipeline.report.made_up import effect
from pipeline.report.page import Page

from jaxqat.pipeline.report import ReportError, layer_figures, theme, write_analysis
from jaxqat.pipeline.report.analysis import worst_tensors

LINKS = ("src", "srcset", "href")


@pytest.fixture
def undrawn(monkeypatch):
    for name in ("draw_noise", "draw_sensitivity", "draw_histograms"):
        monkeypatch.setattr(layer_figures, name, lambda *data, theme: b"a figure")


def test_the_page_is_self_contained_with_figures_in_both_themes(tmp_path):
    path = write_analysis(tmp_path, made_up())
    page = Page(path.read_text())
    assert path == tmp_path / "analysis.html" and list(tmp_path.iterdir()) == [path]
    links = [a.get(key) or "" for _, a in page.tags for key in a if key in LINKS]
    assert not page.open and all(link.startswith("data:") for link in links)
    assert "url(" not in path.read_text() and "<script" not in path.read_text()
    pictures = {base64.b64decode(image.partition("base64,")[2]) for image in page.images}
    assert len(pictures) == 6 and all(p.startswith(b"\x89PNG") for p in pictures)
    assert page.tables_outside_scroll == 0


def test_the_most_sensitive_layer_comes_first(tmp_path, undrawn):
    page = Page(write_analysis(tmp_path, made_up()).read_text())
    rows = [row for row in page.rows if row[0].startswith("block")]
    assert [row[0] for row in rows] == [f"block{i}/conv" for i in reversed(range(8))]
    noise = ["8 / 8", "–", "40.0", "−3.2", "−0.5 … 1.55", "−0.5 … 1.5", "0.15"]
    assert rows[0][1:] == [*noise, "23.0", "90.00", "50.00", "27.0", "90.00", "50.00"]
    assert "1,234 images of the test split" in page.text
    assert "43.75 %accuracy quantized" in page.text.replace("\n", "")


def test_without_labels_there_is_no_accuracy(tmp_path):
    unlabelled, found = effect(20.0, accuracy=None), made_up()
    rows = (replace(row, alone=unlabelled, without=unlabelled) for row in found.sensitivity)
    found = replace(found, real=unlabelled, quantized=unlabelled, sensitivity=tuple(rows))
    page = Page(write_analysis(tmp_path, found).read_text())
    assert "Without labels there is no accuracy" in page.text
    assert "accuracy in float" not in page.text


@pytest.mark.parametrize("number", [1, 8], ids=["one layer", "all layers"])
@pytest.mark.parametrize("unknown", [None, "block/dynamic"], ids=["embedding", "dynamic"])
def test_layers_whose_input_has_no_static_range_are_shown_without_it(tmp_path, number, unknown):
    found = made_up()
    layers = [replace(layer, input=unknown) for layer in found.layers[:number]]
    layers += found.layers[number:]
    read = {layer.input for layer in layers}
    tensors = tuple(tensor for tensor in found.tensors if tensor.name in read)
    found = replace(found, layers=tuple(layers), tensors=tensors)
    page = Page(write_analysis(tmp_path, found).read_text())
    rows = {row[0]: row for row in page.rows if row[0].startswith("block")}
    assert len(rows) == 8
    assert rows["block0/conv"][3] == "–" and rows["block0/conv"][5:8] == ["–"] * 3
    assert (rows["block7/conv"][3] == "–") is (number == 8)
    assert len(page.images) == (4 if number == 8 else 6)  # Each figure in light and in dark.
    assert ("Inputs and their ranges" in page.text) is (number < 8)


def test_names_are_shown_as_text_and_never_as_markup(tmp_path, undrawn):
    found, odd = made_up(1), "<script>{{ 7*7 }}"
    layers = tuple(replace(layer, path=odd) for layer in found.layers)
    sensitivity = tuple(replace(row, path=odd) for row in found.sensitivity)
    found = replace(found, layers=layers, sensitivity=sensitivity)
    page = Page(write_analysis(tmp_path, found).read_text())
    assert page.rows[-1][0] == odd


def test_histograms_show_the_inputs_of_the_most_sensitive_layers_once():
    names = [tensor.name for tensor in worst_tensors(made_up())]
    assert names == [f"block{i}/conv/input" for i in (7, 6, 5, 4, 3, 2)]
    assert [tensor.name for tensor in worst_tensors(made_up(2))] == ["block1/conv/input"]


def test_the_figures_show_their_data():
    found = made_up()
    layer, tensor, row = found.layers[0], found.tensors[0], found.sensitivity[0]
    counts = (*tensor.counts[:40], 2000, *tensor.counts[41:])
    changed = replace(
        found,
        layers=(replace(layer, output_sqnr_db=50.0), *found.layers[1:]),
        tensors=(replace(tensor, counts=counts), *found.tensors[1:]),
        sensitivity=(replace(row, alone=effect(1.0)), *found.sensitivity[1:]),
    )

    def draw(data):
        light = theme.LIGHT
        return (
            layer_figures.draw_noise(data, light),
            layer_figures.draw_sensitivity(data, light),
            layer_figures.draw_histograms(data.tensors[:1], light),
        )

    for before, again, after in zip(draw(found), draw(found), draw(changed), strict=True):
        assert before == again != after


def test_a_page_that_cannot_be_replaced_is_named_and_leaves_no_temporary_file(tmp_path, undrawn):
    (tmp_path / "analysis.html").mkdir()  # Root may write anywhere, but not over a folder.
    with pytest.raises(ReportError, match=r"analysis\.html"):
        write_analysis(tmp_path, made_up(1))
    assert [p.name for p in tmp_path.iterdir()] == ["analysis.html"]
