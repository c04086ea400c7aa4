"""The page of `jaxqat export --format web`, and the page in a browser."""

import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from browser import Tab, chromium, find_chromium, served
from integer.graphs import build, pixels

import jaxqat
from jaxqat.errors import ExportError
from jaxqat.export._onnx.float_network import float_model
from jaxqat.export._onnx.runtime import make_session, run_onnx
from jaxqat.export._web.page import CDN, VERSION, export_web, find_runtime

pytest.importorskip("onnxruntime")

METADATA = {
    "name": "residual",
    "labels": [f"class {i}" for i in range(5)],
    "normalization": {"mean": [0.49, 0.48, 0.45], "std": [1 / 4.05, 1 / 4.11, 1 / 3.82]},
}
IMAGES = 20
RUNTIME = find_runtime()


@pytest.fixture(scope="module")
def graph() -> jaxqat.IntegerGraph:
    return dataclasses.replace(build("residual", seed=1), metadata=METADATA)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def described(folder: Path) -> dict:
    return json.loads((folder / "network.json").read_text())


def test_the_page_has_both_networks_with_their_bytes(tmp_path, graph):
    folder = tmp_path / "page"
    assert export_web(graph, folder, examples=[("a/b", b"first"), ("c", b"second")]) is None
    found = described(folder)

    images = pixels(graph, 3)
    expected = np.asarray(jaxqat.make_executor(graph)(images))
    np.testing.assert_array_equal(run_onnx(folder / "integer.onnx", images)[0], expected)
    assert [each["name"] for each in found["networks"]] == ["integer", "float32"]
    for each in found["networks"]:
        assert each["bytes"] == (folder / each["file"]).stat().st_size
    assert (found["shape"], found["labels"]) == ([*graph.input_shape], METADATA["labels"])
    assert found["examples"] == [
        {"file": "examples/00.png", "label": "a/b"},
        {"file": "examples/01.png", "label": "c"},
    ]
    assert (folder / "examples/01.png").read_bytes() == b"second"
    assert found["runtime"] == f"{CDN}/ort.wasm.min.mjs" and f"@{VERSION}/" in CDN
    assert {"index.html", "page.js", "style.css"} <= {path.name for path in folder.iterdir()}


def test_an_installed_runtime_is_found_and_copied(tmp_path, graph):
    dist = tmp_path / "node_modules/onnxruntime-web/dist"
    inside = tmp_path / "a/b"
    inside.mkdir(parents=True)
    dist.mkdir(parents=True)
    stem = "ort-wasm-simd-threaded"
    for name in ("ort.wasm.min.mjs", f"{stem}.mjs"):
        (dist / name).write_text(name)
    assert find_runtime(inside) is None  # It is incomplete.
    (dist / f"{stem}.wasm").write_text("wasm")
    assert find_runtime(inside) == dist

    export_web(graph, inside / "page", runtime=dist)
    copied = inside / "page/onnxruntime-web"
    assert {path.name: path.read_text() for path in copied.iterdir()} == {
        path.name: path.read_text() for path in dist.iterdir()
    }
    assert described(inside / "page")["runtime"] == "./onnxruntime-web/ort.wasm.min.mjs"


@pytest.mark.parametrize(
    ("name", "metadata", "reason"),
    [
        ("residual", {}, "does not say how its input is normalized"),
        ("gated", METADATA, "a float network with tables is not written"),
    ],
)
def test_a_network_without_a_float_form_is_alone_on_its_page(tmp_path, name, metadata, reason):
    graph = dataclasses.replace(build(name), metadata=metadata)
    found = export_web(graph, tmp_path / "page")

    assert found is not None and reason in found
    assert [each["name"] for each in described(tmp_path / "page")["networks"]] == ["integer"]


def test_a_missing_package_leaves_no_folder(tmp_path, graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(jaxqat.MissingPackageError, match="'onnx' is not installed"):
        export_web(graph, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_a_network_that_takes_no_images_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"needs a network of uint8 images of 1 or 3 channels"):
        export_web(build("mlp"), tmp_path / "page")
    assert not list(tmp_path.iterdir())


def test_files_are_overwritten_only_on_request(tmp_path, graph):
    (tmp_path / "old").write_text("old")
    with pytest.raises(ExportError, match=r"holds files; .*--overwrite"):
        export_web(graph, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    export_web(graph, tmp_path, overwrite=True)
    assert (tmp_path / "old").exists() and (tmp_path / "index.html").exists()
    with pytest.raises(ExportError, match="is a file"):
        export_web(graph, tmp_path / "old")
    with pytest.raises(ExportError, match=r"the folder .*none does not exist"):
        export_web(graph, tmp_path / "none" / "page")


@pytest.fixture(scope="module")
def page(graph, tmp_path_factory) -> Iterator[tuple[Tab, Path, np.ndarray]]:
    """The page in a browser, a folder of images, and their pixels."""
    if find_chromium() is None:
        pytest.skip("there is no Chromium here")
    if RUNTIME is None:
        pytest.skip("onnxruntime-web is not installed here: npm install onnxruntime-web")
    folder = tmp_path_factory.mktemp("web")
    images = pixels(graph, IMAGES)
    export_web(graph, folder, overwrite=True, runtime=RUNTIME, examples=[("one", png(images[0]))])
    files = tmp_path_factory.mktemp("images")
    for number, image in enumerate(images):
        (files / f"{number:02}.png").write_bytes(png(image))
    with served(folder) as address, chromium() as tab:
        tab.open(f"{address}/index.html")
        tab.wait("!document.getElementById('status').textContent.startsWith('Loading')")
        assert tab.evaluate("document.getElementById('status').textContent") == "Ready."
        yield tab, files, images


def results(tab: Tab, count: int, *, keep: bool = False) -> list[dict]:
    """Return name, logits and first class of all results, sorted by name; then remove them."""
    tab.wait(f"document.querySelectorAll('#results .name').length >= {count}")
    found = tab.evaluate(
        "[...document.querySelectorAll('#results li')].map(e => ({logits: e.logits, "
        "name: e.querySelector('.name').textContent, first: e.querySelector('span').textContent}))"
    )
    if not keep:
        tab.evaluate("document.getElementById('results').replaceChildren()")
    return sorted(found, key=lambda each: each["name"])


def test_the_browser_computes_the_logits_that_python_computes(page, graph):
    tab, files, images = page
    paths = sorted(files.iterdir())
    tab.choose_files("#files", paths)
    found = results(tab, IMAGES)

    expected = np.asarray(jaxqat.make_executor(graph)(images))
    assert [each["name"] for each in found] == [path.name for path in paths]
    logits = np.array([each["logits"]["integer"] for each in found], np.float32)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    np.testing.assert_array_equal(logits, expected)  # Integers have no rounding to differ in.
    assert len(set(expected.argmax(-1))) > 1
    for each, best in zip(found, expected.argmax(-1), strict=True):
        assert each["first"].startswith(f"class {best}: ")
    # The network in float32 reads the same pixels, normalized in the browser.
    mean, std = (np.array(METADATA["normalization"][key]) for key in ("mean", "std"))
    normalized = ((images / 255 - mean) / std).astype(np.float32)
    (real,) = make_session(float_model(graph)).run(None, {"images": normalized})
    shown = np.array([each["logits"]["float32"] for each in found])
    # Sums of at most 3 * 3 * 32 products in another order, through a few layers.
    np.testing.assert_allclose(shown, real, atol=1e-4 * np.abs(real).max())
    assert tab.problems == []


def test_the_readmes_lines_compute_the_class_in_the_browser(page, graph):
    tab, _, images = page
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"^```js\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    height, width, _ = graph.input_shape
    # In a function, modules are imported by a call; the example's canvas has 32 x 32 pixels.
    for before, after in (
        (f'import * as ort from "{CDN}/ort.wasm.min.mjs"', "const ort = await import(RUNTIME)"),
        ("RUNTIME", "new URL('./onnxruntime-web/ort.wasm.min.mjs', location.href).href"),
        ('"network.onnx"', '"integer.onnx"'),
        ("0, 0, 32, 32", f"0, 0, {width}, {height}"),
        ("console.log(", "return ("),
    ):
        assert before in code
        code = code.replace(before, after)
    tab.evaluate("document.querySelector('#examples button').click()")
    results(tab, 1, keep=True)
    best = int(np.asarray(jaxqat.make_executor(graph)(images[:1])).argmax())
    assert tab.evaluate(f"(async () => {{ {code} }})()") == best
    tab.evaluate("document.getElementById('results').replaceChildren()")


def test_an_example_is_classified_by_a_click(page, graph):
    tab, _, images = page
    tab.evaluate("document.querySelector('#examples button').click()")
    (found,) = results(tab, 1)
    assert found["name"] == "one"
    expected = np.asarray(jaxqat.make_executor(graph)(images[:1]))[0]
    np.testing.assert_array_equal(np.float32(found["logits"]["integer"]), expected)


def pixels_of(tab: Tab, path: Path, width: int, height: int) -> list[int]:
    """What the page shows of an image, as bytes of red, green, blue and alpha."""
    tab.choose_files("#files", [path])
    tab.wait("document.querySelectorAll('#results .name').length >= 1")
    shown = tab.evaluate(
        "Array.from(document.querySelector('#results canvas').getContext('2d')"
        f".getImageData(0, 0, {width}, {height}).data)"
    )
    tab.evaluate("document.getElementById('results').replaceChildren()")
    return shown


def test_a_larger_image_is_scaled_and_cropped_in_the_middle(page, graph, tmp_path):
    tab, _, images = page
    height, width, _ = graph.input_shape
    # Grey left and right of the middle; inside, each pixel is a square of four.
    wide = np.full((2 * height, 4 * width, 3), 128, np.uint8)
    wide[:, width : 3 * width] = images[0].repeat(2, 0).repeat(2, 1)
    path = tmp_path / "wide.png"
    path.write_bytes(png(wide))
    shown = pixels_of(tab, path, width, height)
    seen = np.array(shown).reshape(height, width, 4)[1:-1, 1:-1, :3]
    # The browser's filter may reach into neighbours; a shifted crop would differ by far more.
    assert np.abs(seen - images[0][1:-1, 1:-1].astype(int)).mean() < 4


def test_what_is_transparent_is_white_as_in_python(page, graph, tmp_path):
    tab, _, images = page
    height, width, _ = graph.input_shape
    rgba = np.concatenate([images[0], np.zeros((height, width, 1), np.uint8)], -1)
    path = tmp_path / "logo.png"
    path.write_bytes(png(rgba))
    shown = pixels_of(tab, path, width, height)
    assert set(shown) == {255}


def test_a_page_that_is_opened_as_a_file_says_what_to_do(tmp_path, graph):
    if find_chromium() is None:
        pytest.skip("there is no Chromium here")
    export_web(graph, tmp_path, overwrite=True)
    with chromium() as tab:
        tab.open((tmp_path / "index.html").as_uri())
        shown = tab.evaluate("document.getElementById('status').textContent")
    assert "python -m http.server" in shown


def test_a_file_that_is_no_image_is_named(page, tmp_path):
    tab, _, _ = page
    path = tmp_path / "text.png"
    path.write_text("no image")
    tab.choose_files("#files", [path])
    tab.wait("document.getElementById('status').textContent.startsWith('text.png: cannot be read')")
    assert tab.evaluate("document.querySelectorAll('#results li').length") == 0


def test_the_camera_is_classified_until_it_is_stopped(page):
    tab, _, _ = page  # Chromium shows its own moving picture.
    tab.evaluate("document.getElementById('camera').click()")
    tab.wait("document.querySelector('#results .name')?.textContent === 'camera'")
    tab.evaluate("document.getElementById('camera').click()")
    tab.wait("document.getElementById('video').hidden")
    assert tab.problems == []
