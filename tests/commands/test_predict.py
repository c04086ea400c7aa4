"""`jaxqat predict`: image files by a run, an exported file and a saved network."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from PIL import Image
from tiny_run import run_command, tiny

import jaxqat
from jaxqat.commands import predict
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import restore_model

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished = tiny_run.console, tiny_run.finished
DATA = load_dataset(tiny().data)
IMAGES = DATA.test.images[:6]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images as PNG files, in folders, beside a file that is no image."""
    base = tmp_path / "images"
    for i, image in enumerate(IMAGES):
        path = base / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    (base / "notes.txt").write_text("no image")
    return base


ORDER = [0, 2, 4, 1, 3, 5]  # Of the files, by their paths.


def expected(logits) -> list[tuple[str, float]]:
    shares = np.asarray(jax.nn.softmax(np.asarray(logits)))[ORDER]
    return [(str(i), p) for i, p in zip(shares.argmax(-1), shares.max(-1), strict=True)]


def assert_is(found: list[Any], wanted: list[tuple[str, float]]) -> None:
    assert [guess.label for guess in found] == [label for label, _ in wanted]
    # JAX's softmax is in float32: a few roundings of the sum of ten shares.
    np.testing.assert_allclose(
        [guess.probability for guess in found], [p for _, p in wanted], rtol=2**-20
    )


def test_a_run_predicts_by_its_integer_and_its_float_network(
    finished, folder, small_network, console
):
    before = tiny_run.files(finished)
    found = predict.predict(finished, [folder], console=console)
    assert [Path(each.image).name for each in found] == [f"{i}.png" for i in ORDER]
    run = jaxqat.load_run(finished)
    assert_is([each.integer for each in found], expected(run.predict(IMAGES)))
    networks = Networks.build(tiny(), DATA)
    variables = restore_model(networks, RunFolder(finished), "fp32").tree()
    real = networks.modules["fp32"].apply(
        variables, networks.normalize(jnp.asarray(IMAGES)), train=False
    )
    floats = [each.float for each in found]
    assert all(floats)
    # Compiled or not, the same float32 sums, of at most 36 products a layer.
    wanted = expected(real)
    assert [guess.label for guess in floats if guess] == [label for label, _ in wanted]
    np.testing.assert_allclose(
        [guess.probability for guess in floats if guess], [p for _, p in wanted], rtol=2**-16
    )
    shown = console.file.getvalue()
    assert "integer (%)" in shown and "float (%)" in shown and "0.png" in shown
    assert tiny_run.files(finished) == before


def test_files_and_saved_networks_give_the_integer_predictions(
    finished, folder, tmp_path, capsys, small_network
):
    pytest.importorskip("onnxruntime")
    graph = jaxqat.load(finished / "integer")
    sources = [finished / "integer"]
    for kind in ("uint8", "float"):
        sources.append(jaxqat.export_onnx(graph, tmp_path / f"{kind}.onnx", input=kind))
    wanted = expected(jaxqat.make_executor(graph)(IMAGES))
    for source in sources:
        assert run_command("predict", source, folder, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert [each["float"] for each in found] == [None] * 6
        assert_is([predict.Guess(**each["integer"]) for each in found], wanted)


def test_a_run_without_its_checkpoints_predicts_by_the_integer_network(
    finished, folder, tmp_path, console
):
    ignored = shutil.ignore_patterns("checkpoints")
    run = Path(shutil.copytree(finished, tmp_path / "run", ignore=ignored))
    found = predict.predict(run, [folder / "1", folder / "0" / "0.png"], console=console)
    assert [each.float for each in found] == [None] * 4
    assert "float" not in console.file.getvalue()


def test_another_size_is_refused_or_resized_by_rule(finished, tmp_path, capsys):
    network, path = finished / "integer", tmp_path / "large.png"
    Image.fromarray(np.kron(IMAGES[0, ..., 0], np.ones((4, 5), np.uint8))).save(path)
    assert run_command("predict", network, path) == 2
    assert f"{path}: 32x40 pixels, and the network takes 8x8. Pass --resize" in (
        capsys.readouterr().err
    )
    assert run_command("predict", network, path, "--resize", "--json") == 0
    (resized,) = json.loads(capsys.readouterr().out)
    # Scale the shorter side and crop the middle, with Pillow alone.
    image = Image.open(path).crop((4, 0, 36, 32)).resize((8, 8), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)[None, ..., None]
    logits = np.asarray(jaxqat.make_executor(jaxqat.load(network))(pixels))
    assert resized["integer"]["label"] == str(logits.argmax())
    # The images of this run were resized in training, so these are, too.
    run = Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("check*")))
    config = run / "config.yaml"
    assert "image_size: null" in config.read_text()
    config.write_text(config.read_text().replace("image_size: null", "image_size: 8"))
    assert run_command("predict", run, path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == [resized]


def test_a_network_of_grey_images_takes_images_in_colour_as_grey_ones(finished, tmp_path, capsys):
    network, path = finished / "integer", tmp_path / "colour.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    assert run_command("predict", network, path, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    # ITU-R 601-2 in 16 bits, as in the page's script.
    weighted = pixels.astype(int) @ np.array([19595, 38470, 7471])
    grey = ((weighted + 0x8000) // 2**16).astype(np.uint8)
    logits = np.asarray(jaxqat.make_executor(jaxqat.load(network))(grey[None, ..., None]))
    powers = np.exp(logits[0].astype(np.float64) - logits.max())
    assert found["integer"]["label"] == str(logits.argmax())
    assert found["integer"]["probability"] == pytest.approx(powers.max() / powers.sum(), rel=1e-12)


def test_what_is_no_image_and_no_network_is_named(finished, folder, tmp_path, capsys):
    network, colour = finished / "integer", tmp_path / "colour.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(colour)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((network, folder / "notes.txt"), "bytes are no image that Pillow knows"),
        ((network, tmp_path / "empty"), "empty: holds no image"),
        ((network, tmp_path / "none"), "none: there is no such image or folder"),
        ((folder / "notes.txt", colour), "is neither a run folder, nor an .onnx file"),
        ((network,), "the images"),
    ):
        assert run_command("predict", *arguments) == 2
        assert message in capsys.readouterr().err
