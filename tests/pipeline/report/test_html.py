import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from pipeline.report.page import Page

from jaxqat.pipeline.report import ReportError, figures, write_report
from jaxqat.pipeline.report.gallery import data_url


@pytest.fixture
def undrawn(monkeypatch):
    """Save the seconds for drawing if a test reads only the text of the page."""
    names = ("curves", "confusion", "ranges", "errors", "f1", "sizes", "samples")
    for name in names:
        monkeypatch.setattr(figures, f"draw_{name}", lambda *data, theme=None: b"a figure")


@pytest.fixture
def show(write_run, undrawn):
    """Function that returns the page of a made-up run; `change` edits its results first."""

    def make(change=None, **options) -> Page:
        workdir = write_run(**options)
        if change:
            results = json.loads((workdir / "results.json").read_text())
            change(results)
            (workdir / "results.json").write_text(json.dumps(results))
        return Page(write_report(workdir).read_text())

    return make


def test_page_is_self_contained(show):
    page = show()

    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    links = [a.get(key) for _, a in page.tags for key in ("src", "srcset", "href") if a.get(key)]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not page.open  # Every element is closed.


def test_the_contents_link_to_every_section(show):
    page = show(deployed=True)
    links = [a["href"] for tag, a in page.tags if tag == "a"]

    assert links == [f"#{a['id']}" for tag, a in page.tags if tag == "h2"]
    assert len(links) == 11


def test_the_page_links_to_the_analysis_if_there_is_one(write_run, undrawn):
    workdir = write_run()
    assert "analysis.html" not in write_report(workdir).read_text()

    (workdir / "analysis.html").touch()
    assert '<a href="analysis.html">' in write_report(workdir).read_text()


def test_page_makes_no_request_from_its_style_sheet(write_run, undrawn):
    text = write_report(write_run()).read_text()

    assert "url(" not in text and "@import" not in text


def test_every_table_scrolls_in_its_own_box(show):
    page = show(deployed=True)

    assert sum(tag == "table" for tag, _ in page.tags) == 6
    assert page.tables_outside_scroll == 0


@pytest.mark.slow
def test_embedded_images_are_the_files_beside_the_page(write_run):
    workdir = write_run(fp32_epochs=3, qat_epochs=2, deployed=True)
    page = Page(write_report(workdir).read_text())
    embedded = {base64.b64decode(image.partition("base64,")[2]) for image in page.images}
    files = {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}

    assert sorted(files) == [
        "confusion_fp32.png",
        "confusion_integer.png",
        "confusion_qat.png",
        "curves_fp32.png",
        "curves_qat.png",
        "errors.png",
        "f1.png",
        "ranges.png",
        "samples.png",
        "sizes.png",
    ]
    # The page shows the images of samples.png one by one: ten, of which some are shown again.
    assert {content for name, content in files.items() if name != "samples.png"} < embedded
    assert len(embedded) == 28  # Of nine figures, half are drawn for a dark page.


def test_every_image_is_shown_with_its_class_and_the_predictions_of_both_networks(show):
    page = show(fp32_epochs=2, qat_epochs=1, deployed=True)
    # FP32 is right; the integer network takes class 1 for 2, and 4 to 9 for 0 to 3.
    text = " ".join(page.text.split())

    # exp(2) / (exp(2) + 9) and exp(3) / (exp(3) + 9).
    sample = "automobileFP32: automobile, 45.09 %integer: bird, 69.06 %"
    assert text.count(sample) == 3  # Among the samples, the changed classes and the errors.
    assert text.count("airplaneFP32: airplane, 45.09 %integer: airplane, 69.06 %") == 1
    assert "7 of 10 test images get another class by QAT W8A8, integer than by FP32." in text
    assert "QAT W8A8, integer is wrong on 7 of 10 test images." in text
    right = [a.get("class") for tag, a in page.tags if tag == "span"]
    assert (right.count("right"), right.count("wrong")) == (2 * 24 - 7 * 3, 7 * 3)


def test_an_image_is_embedded_with_its_own_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3), np.uint8)
    for pixels, shown in ((images[0], images[0]), (images[1, ..., :1], images[1, ..., 0])):
        png = base64.b64decode(data_url(pixels).partition("base64,")[2])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), shown)
    large = base64.b64decode(data_url(np.zeros((300, 150, 3), np.uint8)).partition("base64,")[2])
    assert Image.open(io.BytesIO(large)).size == (64, 128)


def test_run_of_one_epoch_without_qat_has_a_page(write_run):
    workdir = write_run(data="digits", fp32_epochs=1, qat_epochs=0, validation=False, channels=1)
    results = json.loads((workdir / "results.json").read_text())
    (workdir / "results.json").write_text(json.dumps(results | {"layers": []}))
    (workdir / "report_data.npz").unlink()
    page = Page(write_report(workdir).read_text())

    names = sorted(path.name for path in (workdir / "figures").iterdir())
    assert names == ["confusion_fp32.png", "curves_fp32.png", "f1.png"]
    assert not any(row[0].startswith("QAT") for row in page.rows)
    assert "Not comparable with the paper" in page.text
    assert "the data set is digits" in page.text


def test_names_are_shown_as_text_and_never_as_markup(show):
    evil = "<script>alert(1)</script>"
    names = [evil, '"><img src=x>', "{{ 7*7 }}", "$x$"]

    def change(results):
        results["command"] = results["data"]["description"] = evil
        results["layers"][-1]["float_reason"] = evil

    page = show(change, name=evil, class_names=names, fp32_epochs=2, qat_epochs=1)
    tags = {tag for tag, _ in page.tags}

    assert "script" not in tags
    assert page.text.count(evil) >= 5
    assert "{{ 7*7 }}" in page.text
    assert all(image.startswith("data:image/png;base64,") for image in page.images)


@pytest.mark.parametrize(
    ("options", "comparable"),
    [({}, True), ({"width": 16}, False), ({"fp32_epochs": 2}, False), ({"data": "x"}, False)],
    ids=["paper", "narrow", "short", "other_data"],
)
def test_page_says_whether_the_run_compares_with_the_paper(show, options, comparable):
    page = show(**options)

    assert ("Not comparable" in page.text) is not comparable
    paper = ["FP32", "paper", "94.79", "94.79", "94.78", "94.79", "–"]
    assert (paper in page.rows) is ("data" not in options)
    assert page.rows[0][2:] == [
        "Accuracy (%)",
        "Precision (%)",
        "Recall (%)",
        "F1 (%)",
        "Loss (nats)",
    ]


def test_table_of_scores_holds_the_scores_of_results(show):
    def change(results):
        results["fp32"]["test"] |= {"accuracy": 0.91234, "precision": 0.5, "recall": 0.25}
        results["fp32"]["test"] |= {"f1": 1 / 3, "loss": 0.31416}

    page = show(change, fp32_epochs=2, qat_epochs=1)

    assert ["FP32", "this run", "91.23", "50.00", "25.00", "33.33", "0.3142"] in page.rows


def test_the_integer_network_has_its_row_and_figures(show):
    page = show(fp32_epochs=2, qat_epochs=1, deployed=True)
    names = [row[0] for row in page.rows if row[1:2] == ["this run"]]

    assert names == ["FP32", "QAT W8A8, quantized", "QAT W8A8, integer"]
    assert any(row[:3] == ["QAT W8A8, integer", "–", "9,120"] for row in page.rows)
    assert "points, QAT W8A8, integer − FP32" in page.text
    assert "FP32 to W8A8: report of one run" in page.text
    assert "Integer: the integer network converted from it" in page.text
    assert "Each weight takes one byte" in page.text


def ptq(results, **changes):
    """Return the results of post-training quantization, with the scores of FP32."""
    entry = {"test": results["fp32"]["test"], "requantization": "float", "step": 390}
    entry |= {"bits": "W4A8", "calibration_batches": 8, "calibration_images": 1024}
    return entry | {"recipe": {}, "size_bytes": 11_250_000} | changes


def test_post_training_quantization_is_shown_beside_fine_tuning(show):
    def change(results):
        results["ptq"] = {"w4a8": ptq(results), "int8": ptq(results, bits="W8A8")}
        results["speed"]["ptq_w4a8"] = {"evaluate_images_per_s": 8110.0}

    page = show(change, fp32_epochs=2, qat_epochs=1, deployed=True)

    names = [row[0] for row in page.rows if row[1:2] == ["this run"]]
    ptqs = ["PTQ W4A8 (w4a8), integer", "PTQ W8A8 (int8), integer"]
    integer = [*ptqs, "QAT W8A8, quantized", "QAT W8A8, integer"]
    assert names == ["FP32", *integer]
    assert any(
        "Confusion matrix of PTQ W4A8 (w4a8), integer:" in a.get("alt", "") for _, a in page.tags
    )
    assert any(row[:3] == ["PTQ W4A8 (w4a8), integer", "–", "8,110"] for row in page.rows)
    assert "ranges from 1,024 training images (8 batches; recipe w4a8), 1,024" in page.text
    assert "points, QAT W8A8, integer − FP32" in page.text


def test_a_network_of_four_bits_is_never_called_int8(write_run, undrawn):
    workdir = write_run(fp32_epochs=2, qat_epochs=1, deployed=True)
    path = workdir / "results.json"
    path.write_text(path.read_text().replace("W8A8", "W4A4"))

    text = write_report(workdir).read_text()
    assert "QAT W4A4, integer" in text and "int8" not in text


def test_a_run_without_fine_tuning_compares_fp32_with_ptq(show):
    def change(results):
        verify = {"tensors": [], "images": 40, "codes": 9, "differing": 7, "largest": 1}
        verify |= {"top1_flips": 0, "top1_flips_fp32": None, "logits_only": False}
        verify |= {"results": 400, "differing_results": 0, "largest_result_difference": 0.0}
        verify |= {"nan_inputs": 0, "unexplained_results": 0}
        results["ptq"] = {"w4a8": ptq(results, verify=verify | {"failures": ["7 codes differ"]})}

    page = show(change, fp32_epochs=2, qat_epochs=0)

    assert "points, PTQ W4A8 (w4a8), integer − FP32" in page.text
    assert next(row for row in page.rows if row[:1] == ["All layers"])[2:4] == [
        "11,250,000",
        "3.97",
    ]
    assert "differs from the quantized network it was converted from: 7 codes differ." in page.text


def test_codes_that_differ_are_counted_by_tensor_and_in_total(show):
    page = show(fp32_epochs=2, qat_epochs=1, deployed=True)

    assert ["stem_conv/input", "8,000,000", "0", "0", "–"] in page.rows
    assert ["stage1/block1/conv2/input", "8,000,000", "3", "1", "36.0"] in page.rows
    assert ["Total", "168,000,000", "3", "1", "–"] in page.rows
    assert (
        "3 of 168,000,000 codes differ, by at most 1; images that change their class: 0."
        in page.text
    )
    assert "in float: 12." in page.text
    assert "differs from the trained one" not in page.text


def test_failures_of_the_verification_are_shown(show):
    def change(results):
        results["verify"]["failures"] = ["2 of 10000 images change their class"]

    page = show(change, fp32_epochs=2, qat_epochs=1, deployed=True)

    assert "differs from the trained one: 2 of 10000 images change their class." in page.text


def test_a_network_that_could_not_be_converted_is_named_with_the_reason(show):
    def change(results):
        results["conversion_error"] = "It cannot:\n  stem (conv): <rule>"

    page = show(change, fp32_epochs=2, qat_epochs=1)

    assert "This run has no integer network. It cannot:\n  stem (conv): <rule>" in page.text
    assert "QAT W8A8, integer" not in [row[0] for row in page.rows]
    assert next(row for row in page.rows if row[:1] == ["All layers"])[2:4] == ["–", "–"]
    assert "points, QAT W8A8, quantized − FP32" in page.text


def test_layer_in_float_is_named_with_its_reason(show):
    page = show(fp32_epochs=2, qat_epochs=1)

    assert "20 of 21 layers compute on integer codes" in page.text
    assert "head: the recipe's rule 'head' leaves it in float" in page.text


def test_a_hundred_classes_are_closed_and_numbered(show):
    page = show(class_names=[f"class{i}" for i in range(100)], fp32_epochs=2, qat_epochs=1)

    folded = [attributes for tag, attributes in page.tags if tag == "details"]
    assert all("open" not in attributes for attributes in folded)
    assert any(row[0] == "99 class99" for row in page.rows)


def test_frozen_epochs_are_explained_only_if_there_are_some(write_run, undrawn):
    workdir = write_run(fp32_epochs=2, qat_epochs=2)
    assert "statistics are frozen" in write_report(workdir).read_text()

    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"frozen": true', '"frozen": false'))
    assert "statistics are frozen" not in write_report(workdir).read_text()


def test_the_page_says_if_the_best_checkpoint_was_selected(write_run, undrawn):
    workdir = write_run(fp32_epochs=2, qat_epochs=1)
    assert "weights of best validation accuracy" not in write_report(workdir).read_text()

    with (workdir / "config.yaml").open("a") as file:
        file.write("select: best\n")
    assert "weights of best validation accuracy" in write_report(workdir).read_text()


@pytest.mark.slow
def test_same_run_gives_the_same_bytes(write_run):
    workdir = write_run(fp32_epochs=2, qat_epochs=1)

    assert write_report(workdir).read_bytes() == write_report(workdir).read_bytes()


def test_broken_run_writes_nothing(write_run):
    workdir = write_run()
    (workdir / "metrics.jsonl").write_text("{")
    before = sorted(path.name for path in workdir.iterdir())

    with pytest.raises(ReportError, match=r"metrics\.jsonl"):
        write_report(workdir)
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_page_that_cannot_be_replaced_is_named_and_leaves_no_temporary_file(write_run, undrawn):
    workdir = write_run(fp32_epochs=1, qat_epochs=0)
    (workdir / "report.html").mkdir()  # Root may write anywhere, but not over a folder.

    with pytest.raises(ReportError, match=r"report\.html"):
        write_report(workdir)
    assert not list(workdir.rglob("*.tmp"))
