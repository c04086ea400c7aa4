"""Writing ONNX files, and errors from broken files."""

import os
import sys

import numpy as np
import pytest
from integer import graphs
from references import integer_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from jaxqat.errors import ExportError  # noqa: E402
from jaxqat.export._onnx import builder as onnx_builder  # noqa: E402
from jaxqat.export._onnx.builder import DIGEST, digest  # noqa: E402
from jaxqat.export._onnx.model import export_onnx, onnx_model  # noqa: E402
from jaxqat.export._onnx.runtime import load_onnx, run_onnx  # noqa: E402


@pytest.fixture(scope="module")
def graph():
    return graphs.build("mlp")


@pytest.fixture
def images(graph):
    return graphs.pixels(graph, 3)


def refused(match):
    return pytest.raises(ExportError, match=match)


def test_a_written_file_runs(graph, images, tmp_path):
    path = export_onnx(graph, tmp_path / "net.onnx", input="uint8")
    assert path == tmp_path / "net.onnx"
    result, codes = run_onnx(path, images)
    np.testing.assert_array_equal(result, integer_graph.run(graph, images)[1])
    assert codes == {}
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_a_file_is_replaced_only_on_request(graph, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"mine")
    with refused(r"net\.onnx: already exists"):
        export_onnx(graph, path)
    assert path.read_bytes() == b"mine"
    export_onnx(graph, path, overwrite=True)
    assert path.read_bytes() == onnx_model(graph).SerializeToString()


def test_a_path_that_cannot_be_written_is_refused(graph, tmp_path):
    (tmp_path / "file").touch()
    with refused("is a folder"):
        export_onnx(graph, tmp_path)
    with refused("the folder .*absent does not exist"):
        export_onnx(graph, tmp_path / "absent" / "net.onnx")
    with refused("the folder .*file does not exist"):
        export_onnx(graph, tmp_path / "file" / "net.onnx")
    with refused("cannot be written: File name too long"):
        export_onnx(graph, tmp_path / ("n" * 300))
    with refused("cannot be written: File name too long"):  # The temporary file's name.
        export_onnx(graph, tmp_path / ("n" * 255))
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_the_old_file(graph, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused(r"net\.onnx: cannot be written: No space left on device"):
        export_onnx(graph, path, overwrite=True)
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert path.read_bytes() == b"old"


def test_a_network_without_an_onnx_form_writes_nothing(tmp_path):
    with refused("fixed_point"):
        export_onnx(graphs.build("mlp", requantization="fixed_point"), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_a_broken_file_is_refused(graph, images, tmp_path):
    whole = onnx_model(graph, input="uint8").SerializeToString()
    path = tmp_path / "net.onnx"
    for length in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:length])
        with refused(r"net\.onnx: "):
            run_onnx(path, images)
    for position in range(0, len(whole), len(whole) // 50):
        broken = bytearray(whole)
        broken[position] ^= 1
        with refused("the ONNX "):
            run_onnx(bytes(broken), images)


def test_weights_with_a_changed_bit_are_refused(graph, images):
    model = onnx_model(graph, input="uint8")
    weights = next(i for i in model.graph.initializer if i.name == "dense1/weights")
    weights.raw_data = bytes([weights.raw_data[0] ^ 1]) + weights.raw_data[1:]
    with refused("is damaged: its content does not match its checksum"):
        run_onnx(model.SerializeToString(), images)


def test_changed_metadata_and_opset_are_refused(graph, images):
    model = onnx_model(graph, input="uint8")
    load_onnx(model.SerializeToString())
    for change in (
        lambda m: setattr(m.metadata_props[0], "value", '["dog", "cat"]'),
        lambda m: setattr(m.metadata_props.add(key="note"), "value", "mine"),
        lambda m: setattr(m.opset_import[0], "version", 16),
        lambda m: setattr(m, "producer_version", "9"),
        lambda m: setattr(m.graph, "doc_string", "changed"),
    ):
        changed = type(model)()
        changed.CopyFrom(model)
        change(changed)
        with refused("is damaged: its content does not match its checksum"):
            run_onnx(changed.SerializeToString(), images)


def resealed(model):
    """Return the content of a changed model with the right digest."""
    entry = next(e for e in model.metadata_props if e.key == DIGEST)
    entry.value = digest(model)
    return model.SerializeToString()


def test_weights_in_another_file_are_not_read(graph, images, tmp_path, monkeypatch):
    model = onnx_model(graph, input="uint8")
    weights = next(i for i in model.graph.initializer if i.name == "dense1/weights")
    (tmp_path / "secret.bin").write_bytes(weights.raw_data)
    monkeypatch.chdir(tmp_path)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="secret.bin")
    path = tmp_path / "net.onnx"
    path.write_bytes(resealed(model))
    for source in (path, path.read_bytes()):
        with refused("the tensor 'dense1/weights' is in another file"):
            run_onnx(source, images)


@pytest.mark.parametrize(
    "codes", ["{", "[]", '{"a": 1}', '{"a": {"output": 1, "offset": 0}}', "[" * 10**5]
)
def test_resealed_metadata_of_another_form_is_refused(graph, images, codes):
    model = onnx_model(graph, input="uint8")
    next(e for e in model.metadata_props if e.key == "codes").value = codes
    with refused("its metadata 'codes' is invalid"):
        run_onnx(resealed(model), images, expose=True)


def test_a_pipe_is_not_read(images, tmp_path):
    os.mkfifo(tmp_path / "net.onnx")
    with refused("cannot be read: it is not a regular file"):
        run_onnx(tmp_path / "net.onnx", images)


def test_a_file_of_another_program_is_refused(graph, images, tmp_path):
    model = onnx_model(graph)
    del model.metadata_props[:]
    with refused("jaxqat did not write it"):
        run_onnx(model.SerializeToString(), images)
    with refused("cannot be read: No such file"):
        run_onnx(tmp_path / "absent.onnx", images)
    with refused("cannot be read: it is not a regular file"):
        run_onnx(tmp_path, images)


def test_images_of_another_type_or_shape_are_refused(graph, images):
    content = onnx_model(graph).SerializeToString()
    with refused(r"images must be float32 of the shape .*, got uint8 \(3, 4, 4, 2\)"):
        run_onnx(content, images)
    with refused(r"\(n, 4, 4, 2\), .* got float32 \(3, 4, 2\)"):
        run_onnx(content, images[:, 0].astype(np.float32))
    with refused("at least 1"):
        run_onnx(content, images[:0].astype(np.float32))


def test_a_missing_package_is_named(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"'onnx' is not installed.*pip install .*\[onnx\]'"):
        onnx_model(graph)
    assert onnx_builder.library("json").__name__ == "json"
