"""A loaded network equals the saved one; a changed folder raises an error."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from integer import graphs
from references import integer_graph

from jaxqat.integer import graph as g
from jaxqat.integer._store import codec
from jaxqat.integer._store.folder import ArtifactError, load, save

FILES = ["SHA256SUMS", "arrays.npz", "graph.json"]


def content(value):
    """Return a graph as values that compare exactly: types, dtypes, shapes and bytes."""
    if dataclasses.is_dataclass(value):
        return type(value), {k: content(v) for k, v in vars(value).items()}
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return [(k, content(v)) for k, v in value.items()]  # Compares the order too.
    if isinstance(value, tuple | list):
        return type(value), [content(v) for v in value]
    return type(value), value


def positive_float32(bits):
    return np.uint32(bits).view(np.float32)


# Bits of all positive finite float32 values, subnormal ones included.
SCALES = st.integers(1, 0x7F7FFFFF).map(positive_float32)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
METADATA = st.dictionaries(
    st.text(),
    st.recursive(
        PLAIN | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with a saved network that no test changes."""
    return save(graphs.build("residual"), tmp_path_factory.mktemp("saved") / "net")


@pytest.fixture
def copy(saved, tmp_path):
    """Return a copy of a saved network, for a test to change."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "net"))


def sign(folder):
    """Recompute the checksums, so that only a later check can detect a change."""
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("graph.json", "arrays.npz")
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(graphs.CASES)),
    symmetric=st.booleans(),
    bits=st.integers(2, 8),
    requantization=st.sampled_from(["float", "fixed_point"]),
    seed=st.integers(0, 2**31),
    scale=SCALES,
    metadata=METADATA,
)
def test_loading_returns_the_saved_graph(
    tmp_path_factory, name, symmetric, bits, requantization, seed, scale, metadata
):
    try:
        graph = graphs.build(name, symmetric=symmetric, bits=bits, seed=seed)
    except g.GraphError:
        reject()  # Some random 2-bit networks are constant and have no scale.
    odd = dataclasses.replace(next(iter(graph.tensors.values())), scale=scale)
    tensors = {**graph.tensors, odd.name: odd}
    graph = dataclasses.replace(
        graph, tensors=tensors, metadata=metadata, requantization=requantization
    )
    folder = tmp_path_factory.mktemp("any") / "net"
    assert save(graph, folder) == folder
    assert content(load(folder)) == content(graph)
    assert sorted(os.listdir(folder)) == FILES


def test_a_loaded_network_computes_the_same_codes(saved):
    before, after = graphs.build("residual"), load(saved)
    images = graphs.pixels(before, 3)
    (expected, logits), (found, result) = (
        integer_graph.run(graph, images) for graph in (before, after)
    )
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert np.array_equal(result, logits)


def test_the_same_network_gives_the_same_bytes(saved, tmp_path):
    again = save(load(saved), tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_every_node_kind_can_be_saved():
    assert set(codec._CLASSES.values()) == set(g.Node.__subclasses__())


def test_checksums_are_those_of_the_command_sha256sum(saved):
    sums = (saved / "SHA256SUMS").read_bytes()
    sign(saved)
    assert (saved / "SHA256SUMS").read_bytes() == sums


def test_tuples_in_the_metadata_come_back_as_lists(tmp_path):
    graph = dataclasses.replace(graphs.build("mlp"), metadata={"tags": ("cat", ("a", 1))})
    assert load(save(graph, tmp_path / "net")).metadata == {"tags": ["cat", ["a", 1]]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"scale": np.float32(1)}, r"metadata.scale: must be a JSON value"),
        ({"loss": float("nan")}, r"metadata.loss: must be a JSON value"),
        ({"tags": [{1: "cat"}]}, r"metadata.tags\[0\]: the key 1 must be a string"),
    ],
)
def test_metadata_that_json_would_change_raises_an_error(tmp_path, metadata, message):
    graph = dataclasses.replace(graphs.build("mlp"), metadata=metadata)
    with pytest.raises(ArtifactError, match=message):
        save(graph, tmp_path / "net")
    assert os.listdir(tmp_path) == []


def test_a_field_that_holds_another_type_is_refused(tmp_path):
    graph = graphs.build("mlp")
    tensor = next(iter(graph.tensors.values()))
    for change, message in (
        ({"scale": 0.5}, r"tensors.input.scale: must be float32, got 0.5"),
        ({"low": np.int64(-128)}, r"tensors.input.low: must be a whole number, got np.int64"),
    ):
        tensors = {**graph.tensors, tensor.name: dataclasses.replace(tensor, **change)}
        with pytest.raises(ArtifactError, match=message):
            save(dataclasses.replace(graph, tensors=tensors), tmp_path / "net")


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_detected(copy, name):
    path = copy / name
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    positions = {0, len(good) - 1, *rng.integers(0, len(good), 150).tolist()}
    for position in sorted(positions):
        bad = bytearray(good)
        bad[position] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        # For a changed checksum, the message names the file of that checksum too.
        with pytest.raises(ArtifactError, match=r"damaged: content and SHA-256") as caught:
            load(copy)
        assert str(path) in str(caught.value)
    path.write_bytes(good)
    load(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_grown_or_missing_is_named(copy, name):
    path = copy / name
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    for length in (0, 1, len(good) - 1, *rng.integers(0, len(good), 30).tolist()):
        path.write_bytes(good[:length])
        with pytest.raises(ArtifactError, match=r"damaged: content and SHA-256") as caught:
            load(copy)
        assert str(path) in str(caught.value)
    path.write_bytes(good + b"\n")
    with pytest.raises(ArtifactError, match=r"damaged"):
        load(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: is missing"):
        load(copy)


def put(*path, value):
    """Return a function that changes a value in graph.json."""

    def change(graph):
        for key in path[:-1]:
            graph = graph[key]
        graph[path[-1]] = value

    return change


def drop(*path):
    def change(graph):
        for key in path[:-1]:
            graph = graph[key]
        del graph[path[-1]]

    return change


def double(graph):
    graph["tensors"].append(graph["tensors"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", value=2), "format is 2; this version of jaxqat reads 5"),
        (put("format", value=True), "format is True"),
        (drop("format"), "has no 'format'"),
        (put("nodes", 1, "node", value="Softmax"), r"nodes\[1\].node must be .* got 'Softmax'"),
        (put("nodes", 1, value=[]), r"nodes\[1\]: must be an object with 'node'"),
        (put("nodes", 1, "gain", value=1), r"nodes\[1\].gain: Product has no such field"),
        (drop("nodes", 1, "groups"), r"nodes\[1\].groups: is missing"),
        (put("nodes", 1, "groups", value="1"), r"nodes\[1\].groups: must be a whole number"),
        (put("nodes", 1, "groups", value=True), r"nodes\[1\].groups: must be a whole number"),
        (put("nodes", 1, "kind", value="dot"), r"nodes\[1\].kind: must be one of conv, dense"),
        (put("nodes", 1, "padding", 0, value=[1]), r"padding\[0\]: must be a list of 2, got \[1\]"),
        (put("nodes", 1, "inputs", value="input"), r"inputs: must be a list, got 'input'"),
        (put("nodes", 0, "inverse", value=0.5), "inverse: must be a float32 in hexadecimal"),
        (put("nodes", 0, "inverse", value="0x1.0000001p+0"), "must be a float32 in hexadecimal"),
        (put("nodes", 0, "inverse", value="0x1p+200"), "must be a float32 in hexadecimal"),
        (
            put("nodes", 1, "bias", value=[0]),
            "must be an object with array, dtype, shape and sha256",
        ),
        (drop("nodes", 1, "weight_bits"), r"nodes\[1\].weight_bits: is missing"),
        (put("nodes", 1, "weight_bits", value="8"), r"weight_bits: must be a whole number"),
        (put("nodes", 1, "weight_bits", value=9), "node 'stem': weight_bits must .* got 9 and"),
        (put("nodes", 1, "weight_bits", value=4), "bits 4 must be packed to 4 bits each"),
        (put("nodes", 1, "bias", "array", value="x"), "there is no array 'x'"),
        (put("nodes", 1, "bias", "shape", value=[1]), r"must be int32\[1\], got int32\[8\]"),
        (put("tensors", 0, "zero_point", value=-0.0), "zero_point: must be a whole number"),
        (put("tensors", value={}), "tensors: must be a list of tensors"),
        (double, "the name 'input' occurs twice"),
        (put("metadata", value=[]), "metadata: must be an object"),
        (put("requantization", value="int"), "requantization: must be one of float, fixed_point"),
        (put("tensors", 0, "zero_point", value=-200), "not a valid network: tensor 'input': codes"),
        (put("nodes", 1, "output", value="x"), "not a valid network: node 'stem': makes 'x'"),
        (put("outputs", 0, "name", value="nothing"), "is not a valid network: "),
    ],
)
def test_an_invalid_graph_raises_an_error_that_names_the_field(copy, change, message):
    path = copy / "graph.json"
    graph = json.loads(path.read_text())
    change(graph)
    path.write_text(json.dumps(graph))
    sign(copy)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(copy)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "graph.json: is not JSON"),
        (b"[]", "graph.json: has no 'format'"),
        (b"\xff", "graph.json: 'utf-8' codec can't decode"),
    ],
)
def test_a_graph_file_that_is_not_json_is_named(copy, text, message):
    (copy / "graph.json").write_bytes(text)
    sign(copy)
    with pytest.raises(ArtifactError, match=message):
        load(copy)


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_invalid_arrays_raise_an_error_and_nothing_is_unpickled(copy, tmp_path):
    trap = tmp_path / "unpickled"
    with np.load(copy / "arrays.npz") as packed:
        name = next(name for name in packed.files if name.endswith("stem.weights"))
    pickled = archive(**{name: np.array([Trap(trap)], object)})
    for content, message in (
        (pickled, "is not an archive of arrays: Object arrays cannot be loaded"),
        (b"PK\x03\x04", "is not an archive of arrays"),
        (b"", "is not an archive of arrays"),
        (archive(a=np.zeros(1)), "there is no array"),
    ):
        (copy / "arrays.npz").write_bytes(content)
        sign(copy)
        with pytest.raises(ArtifactError, match=message):
            load(copy)
    assert not trap.exists()


def repacked(folder, change, *, compression=zipfile.ZIP_STORED):
    """Write the members of arrays.npz again, as `change` returns them, with right checksums."""
    path = folder / "arrays.npz"
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", compression) as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of names that occur twice.
        for name, data in change(members):
            new.writestr(name, data)
    sign(folder)


def swapped(members):
    """Exchange two arrays of one size: bias and multiplier would be too easy to detect."""
    names = [n for n, _ in members if n.endswith(("multiplier.npy", "weight_scale.npy"))]
    data = dict(members)
    one, other = next((a, b) for a in names for b in names if a < b and data[a] != data[b])
    return list({**data, one: data[other], other: data[one]}.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [*m, ("../../escaped.npy", m[0][1])], "'../../escaped.npy' is not an array"),
        (lambda m: [*m, ("/etc/escaped", b"x")], "'/etc/escaped' is not an array of the graph"),
        (lambda m: [*m, m[0]], "occurs twice"),
        (lambda m: [(n, d[:-1]) for n, d in m], "is not an archive of arrays"),
        (
            lambda m: [(n, b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 9000) for n, _ in m[:1]],
            "is not an",
        ),
        (lambda m: [(n, d.replace(b"(", b"[", 1)) for n, d in m], "is not an archive of arrays"),
        (lambda m: [(n, d.replace(b"NUMPY\1", b"NUMPY\2")) for n, d in m], "unknown version"),
        (swapped, "is not the one that was saved"),
    ],
)
def test_an_archive_with_other_members_is_refused_though_its_checksums_are_right(
    copy, change, message
):
    repacked(copy, change)
    with pytest.raises(ArtifactError, match=message):
        load(copy)
    assert os.listdir(copy.parent) == ["net"]


def test_a_compressed_member_is_never_inflated(copy):
    bomb = lambda m: [*m, ("bomb.npy", bytes(2**24))]  # noqa: E731
    repacked(copy, bomb, compression=zipfile.ZIP_DEFLATED)
    assert (copy / "arrays.npz").stat().st_size < 2**17
    with pytest.raises(ArtifactError, match=r"is compressed|are larger than the file"):
        load(copy)


@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_no_larger_than_declared_are_read(copy, name):
    path = copy / name
    size = path.stat().st_size
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match=rf"{name}: cannot be read: it is not a regular file"):
        load(copy)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match=rf"{name}: cannot be read: it is not a regular file"):
        load(copy)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)  # A sparse file takes no space.
    assert size < 2**16
    with pytest.raises(ArtifactError, match=rf"{name}: cannot be read: it is larger than"):
        load(copy)


def test_arrays_of_another_dtype_or_shape_raise_an_error(copy):
    path = copy / "arrays.npz"
    with np.load(path) as packed:
        arrays = dict(packed)
    name = next(name for name in arrays if name.endswith("stem.weights"))
    for bad in (arrays[name].astype(np.int16), arrays[name][..., :-1]):
        path.write_bytes(archive(**{**arrays, name: bad}))
        sign(copy)
        with pytest.raises(ArtifactError, match=r"stem.weights|nodes\[1\].weights: the array must"):
            load(copy)


def test_a_path_that_is_not_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        with pytest.raises(ArtifactError, match=rf"{name}: holds no integer network"):
            load(tmp_path / name)


def test_an_existing_folder_stays_unchanged_unless_overwriting_is_allowed(copy):
    other = graphs.build("mlp")
    before = {name: (copy / name).read_bytes() for name in FILES}
    with pytest.raises(ArtifactError, match=r"net: already exists"):
        save(other, copy)
    assert {name: (copy / name).read_bytes() for name in FILES} == before
    save(other, copy, overwrite=True)
    assert content(load(copy)) == content(other)
    assert os.listdir(copy.parent) == ["net"]


def test_only_a_saved_network_is_ever_overwritten(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(save(graphs.build("mlp"), tmp_path / "net"))
    for name in ("home", "file", "link"):
        with pytest.raises(ArtifactError, match=rf"{name}: cannot be overwritten"):
            save(graphs.build("mlp"), tmp_path / name, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "link", "net"]


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"none/net: the parent folder does not exist"):
        save(graphs.build("mlp"), tmp_path / "none" / "net")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_the_old_files_and_no_others(copy, tmp_path, monkeypatch, overwrite):
    target = copy if overwrite else tmp_path / "new"

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ArtifactError, match=r"cannot be written: No space left on device"):
            save(graphs.build("mlp"), target, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["net"]
    assert content(load(copy)) == content(graphs.build("residual"))


def test_a_failed_replacement_restores_the_old_network(copy, monkeypatch):
    rename, calls = pathlib.Path.rename, []

    def fail_at_second(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail_at_second)
    with pytest.raises(ArtifactError, match="Input/output error"):
        save(graphs.build("mlp"), copy, overwrite=True)
    assert len(calls) == 3
    assert os.listdir(copy.parent) == ["net"]
    assert content(load(copy)) == content(graphs.build("residual"))
