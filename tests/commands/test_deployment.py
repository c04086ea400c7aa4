"""The commands for a run's integer network: verify, export, lowering."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_run
from tiny_run import files, tiny

from jaxqat import cli, load, make_executor, save
from jaxqat.bench import BenchmarkError
from jaxqat.cli import dispatch
from jaxqat.commands import evaluate, export, lowering, verify
from jaxqat.commands.benchmark import benchmark
from jaxqat.errors import ExportError, InputError
from jaxqat.export import _replay
from jaxqat.integer._store.folder import ArtifactError
from jaxqat.lowering import LoweringError
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.run.folder import RunFolderError

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, finished = tiny_run.console, tiny_run.finished

WANTS_ONNX = "onnxruntime"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def evaluation(run: Path, name: str) -> dict:
    return json.loads((run / "evaluations" / f"{name}.json").read_text())


def tamper(run: Path) -> None:
    """Flip the sign of one weight, as a wrong converter would."""
    graph = load(run / "integer")
    weights = next(graph.products()).weights
    place = np.unravel_index(np.abs(weights).argmax(), weights.shape)
    weights[place] = -weights[place]
    shutil.rmtree(run / "integer")
    save(graph, run / "integer")


@pytest.mark.parametrize("split", ["test", "train"])
def test_verify_finds_no_code_that_differs_from_the_training_graph(
    run, small_network, console, split
):
    before = files(run)
    check = verify.verify(run, split=split, console=console)
    graph = load(run / "integer")
    assert check.failures == ()
    assert check.images == len(getattr(load_dataset(tiny().data), split))
    sizes = {name: int(np.prod(t.shape)) for name, t in graph.tensors.items()}
    assert {t.name: t.codes for t in check.tensors} == {
        name: check.images * size for name, size in sizes.items()
    }
    assert check.differing == check.top1_flips == 0
    written = evaluation(run, f"verify_{split}")
    assert (written["codes"], written["differing"], written["failures"]) == (check.codes, 0, [])
    new = files(run).keys() - before.keys()
    assert {Path(name).name for name in new} == {f"verify_{split}.json"}


def test_verify_fails_if_the_network_is_not_the_trained_one(
    run, small_network, console, monkeypatch
):
    tamper(run)
    check = verify.verify(run, console=console)
    by_name = {t.name: t for t in check.tensors}
    assert by_name["stem_conv/input"].differing == 0
    assert check.differing > 0
    assert check.failures
    assert check.failures[0] in " ".join(console.file.getvalue().split())
    monkeypatch.setattr(dispatch, "Console", lambda **_: console)
    assert cli.main(["verify", str(run)]) == dispatch.FAILED


def test_verify_compares_every_code_with_onnx_runtimes(run, console):
    pytest.importorskip(WANTS_ONNX)
    shutil.rmtree(run / "checkpoints")  # Only the file and the integer network are compared.
    check = verify.verify(run, format="onnx", console=console)
    assert check.failures == ()
    assert {t.name for t in check.tensors} == set(load(run / "integer").tensors)
    assert check.images == 40
    assert evaluation(run, "verify_onnx_test")["differing"] == 0


def test_verify_counts_the_classes_that_openvino_changes(run, console):
    pytest.importorskip("openvino")
    from jaxqat.export._onnx.model import onnx_model
    from jaxqat.export._onnx.openvino import compile_openvino

    check = verify.verify(run, format="openvino", console=console)
    graph, images = load(run / "integer"), load_dataset(tiny().data).test.images
    theirs = compile_openvino(onnx_model(graph, input="uint8"))(images).argmax(-1)
    ours = np.asarray(make_executor(graph)(images)).argmax(-1)
    assert check.top1_flips == (theirs != ours).sum()
    assert (check.images, check.codes, check.logits_only) == (40, 0, True)
    assert bool(check.failures) == bool(check.top1_flips)


def test_the_exported_files_give_the_logits_of_the_integer_network(run, console, tmp_path):
    pytest.importorskip(WANTS_ONNX)
    from jaxqat.export._onnx.runtime import run_onnx
    from jaxqat.export._stablehlo import load_stablehlo

    images = load_dataset(tiny().data).test.images
    expected = np.asarray(make_executor(load(run / "integer"))(images))
    path = export.export(run, tmp_path / "n.onnx", format="onnx", console=console)
    np.testing.assert_array_equal(run_onnx(path, images)[0], expected)
    path = export.export(run, tmp_path / "n.hlo", format="stablehlo", console=console)
    np.testing.assert_array_equal(load_stablehlo(path)(images), expected)
    shown = console.file.getvalue()
    assert f"n.hlo: {path.stat().st_size:,} bytes" in shown


def test_the_page_of_a_run_offers_its_test_images(run, console, tmp_path, monkeypatch):
    pytest.importorskip(WANTS_ONNX)
    monkeypatch.chdir(tmp_path)  # No runtime is installed there.
    page = export.export(run, tmp_path / "page", format="web", console=console)
    found = json.loads((page / "network.json").read_text())
    data = load_dataset(tiny().data)
    assert found["labels"] == list(data.class_names)
    assert [each["name"] for each in found["networks"]] == ["integer", "float32"]
    assert [each["label"] for each in found["examples"]][:10] == [*"0123456789"]
    image = np.asarray(PIL.Image.open(page / found["examples"][0]["file"]))[..., None]
    first = np.flatnonzero(data.test.labels == 0)[0]
    np.testing.assert_array_equal(image, data.test.images[first])
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith(f"{page}: ")
    assert lines[1].startswith("onnxruntime-web: https://")
    assert lines[2] == f"to open it: python -m http.server --directory {page}"
    with pytest.raises(InputError, match="leave out --input float"):
        export.export(run, tmp_path / "other", format="web", input="float", console=console)


@pytest.mark.parametrize(
    ("format", "input"), [("onnx", "float"), ("stablehlo", "uint8"), ("web", "uint8")]
)
def test_the_certificate_beside_an_exported_file_passes_its_replay(
    run, console, tmp_path, capsys, format, input
):
    pytest.importorskip(WANTS_ONNX)
    output = tmp_path / "output.onnx" if format == "onnx" else tmp_path / "output"
    folder = output / "certificate" if format == "web" else Path(f"{output}.certificate")
    options: dict[str, Any] = {"format": format, "input": input, "console": console}
    export.export(run, output, certificate=True, **options)
    assert f"python {folder / 'replay.py'}" in console.file.getvalue()
    _, arrays = _replay.read(folder)
    assert len(arrays["input"]) == 2 * export.GOLDEN
    assert _replay.main(["--folder", str(folder)]) == 0
    shown = capsys.readouterr().out
    count = 1 if format == "stablehlo" else 1 + len(load(run / "integer").tensors)
    assert f"equal: {count} of {count} tensors and results; nothing differs" in shown
    # The integer network of the run itself takes the same images.
    if format == "web":
        runner = ("--runner", "jaxqat", str(run / "integer"))
        assert _replay.main(["--folder", str(folder), *runner]) == 0
    else:
        with pytest.raises(ExportError, match="certificate: already exists"):
            export.export(run, tmp_path / output.name, certificate=True, **options)


@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_an_existing_file_is_replaced_only_on_request(run, console, tmp_path, format):
    path = tmp_path / "file"
    path.write_text("old content")
    with pytest.raises(ExportError, match="exists"):
        export.export(run, path, format=format, console=console)
    assert path.read_text() == "old content"
    export.export(run, path, format=format, overwrite=True, console=console)
    assert path.stat().st_size > 1000
    with pytest.raises(ExportError, match=str(tmp_path / "no")):
        export.export(run, tmp_path / "no" / "file", format=format, console=console)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "run"}


def test_a_damaged_network_is_neither_exported_nor_verified(run, console, tmp_path):
    path = run / "integer" / "arrays.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"arrays\.npz"):
        export.export(run, tmp_path / "file", format="stablehlo", console=console)
    with pytest.raises(ArtifactError, match=r"arrays\.npz"):
        verify.verify(run, console=console)
    assert not (tmp_path / "file").exists()


def test_a_folder_that_is_not_a_run_is_named(tmp_path, console):
    for command in (
        lambda: verify.verify(tmp_path, console=console),
        lambda: export.export(tmp_path, tmp_path / "f", format="stablehlo", console=console),
        lambda: lowering.lowering(tmp_path, target="cpu", console=console),
    ):
        with pytest.raises(RunFolderError, match=str(tmp_path)):
            command()


def test_lowering_shows_every_product_of_a_run_and_its_integer_types(finished, console):
    compiled = lowering.lowering(finished, target="cpu", batch_size=4, console=console)
    shown = console.file.getvalue()
    for node in load(finished / "integer").products():
        assert node.name in shown
    assert compiled is not None
    assert "u8" in shown and "s8" in shown


def test_an_executor_of_another_device_is_an_error(finished, console):
    with pytest.raises(LoweringError, match=r"executor must be one of cpu for cpu, got 'tpu'"):
        lowering.lowering(finished, target="cpu", executor="tpu", console=console)


def test_a_width_is_an_error_for_a_run_with_its_own_network(finished, console):
    with pytest.raises(LoweringError, match="width is for the random ResNet-18"):
        lowering.lowering(finished, target="cpu", width=8, console=console)
    with pytest.raises(BenchmarkError, match="width is for the random ResNet-18"):
        benchmark(finished, width=8, console=console)


def test_an_evaluation_that_cannot_be_written_is_still_printed(run, console, monkeypatch):
    def fail(*arguments):
        raise RunFolderError("cannot be written")

    monkeypatch.setattr("jaxqat.pipeline.run.folder.RunFolder.write_evaluation", fail)
    with pytest.raises(RunFolderError, match="cannot be written"):
        evaluate.evaluate(run, console=console)
    assert "accuracy" in console.file.getvalue()
