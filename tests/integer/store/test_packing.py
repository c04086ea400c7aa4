"""Packed weight codes: the byte layout against a plain reference, and the size on disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from integer import graphs
from integer.models import calibrated, conv, inputs
from integer.store.test_folder import archive, content, put, sign

import jaxqat
from jaxqat.integer import graph as g
from jaxqat.integer._packing import pack, packed_size, stored_bits, unpack
from jaxqat.integer._store.folder import ArtifactError, load, save

WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def packed_plainly(codes, bits):
    """Pack one code at a time, by the documented layout."""
    width = WIDTHS[bits]
    packed = [0] * ((codes.size * width + 7) // 8)
    for index, code in enumerate(codes.flatten().tolist()):
        twos_complement = code if code >= 0 else code + 2**width
        packed[index * width // 8] += twos_complement << (index * width % 8)
    return packed


@st.composite
def coded(draw):
    """Draw a width and an array of codes of this width."""
    bits = draw(st.integers(2, 8))
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
    codes = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return bits, draw(arrays.arrays(np.int8, shape, elements=codes))


@settings(deadline=None)
@given(case=coded())
def test_packed_bytes_follow_the_documented_layout_and_unpack_to_the_codes(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (np.uint8, (packed_size(codes.size, bits),))
    assert packed.tolist() == packed_plainly(codes, bits)
    found = unpack(packed, codes.shape, bits)
    assert (found.dtype, found.shape) == (np.int8, codes.shape)
    assert np.array_equal(found, codes)


def test_every_code_of_every_width_survives_packing_from_a_non_contiguous_array():
    for bits, width in WIDTHS.items():
        every = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)
        codes = np.stack([every, every[::-1], every]).T[::-1]
        assert stored_bits(bits) == width
        assert np.array_equal(unpack(pack(codes, bits), codes.shape, bits), codes)


def test_packed_bytes_match_examples_written_by_hand():
    """The first code is in the lowest bits, in two's complement; unused bits are zero."""
    assert pack(np.array([1, -1, 0, 1, -2], np.int8), 2).tolist() == [0b01_00_11_01, 0b10]
    assert pack(np.array([[7, -7], [-1, 3], [-3, 2]], np.int8).T, 4).tolist() == [
        0xF7, 0x9D, 0x23,
    ]  # fmt: skip
    assert pack(np.array([3, -3, 1], np.int8), 3).tolist() == [0xD3, 0x01]


def narrowed(bits):
    """Return a network with weights of this width."""
    graph, limit = graphs.build("residual"), 2 ** (bits - 1) - 1
    nodes = tuple(
        dataclasses.replace(n, weights=np.clip(n.weights, -limit, limit), weight_bits=bits)
        if isinstance(n, g.Product)
        else n
        for n in graph.nodes
    )
    return dataclasses.replace(graph, nodes=nodes)


@pytest.mark.parametrize(("bits", "per_byte"), [(2, 4), (3, 2), (4, 2), (5, 1)])
def test_the_file_on_disk_shrinks_by_exactly_the_packed_bits(tmp_path, bits, per_byte):
    wide, narrow = graphs.build("residual"), narrowed(bits)
    sizes = [
        (save(graph, tmp_path / name) / "arrays.npz").stat().st_size
        for name, graph in (("wide", wide), ("narrow", narrow))
    ]
    counts = [product.weights.size for product in wide.products()]
    saved = sum(n - -(-n // per_byte) for n in counts)
    # The archive's overhead for an array (name, size, a header padded to 128 bytes) does not depend
    # on its shape or dtype, so the files differ by exactly the bytes of the weights.
    assert sizes[0] - sizes[1] == saved
    assert wide.size_bytes() - narrow.size_bytes() == saved
    assert content(load(tmp_path / "narrow")) == content(narrow)


def network(params, images):
    x = jax.nn.relu(conv(images, params["a"]))
    x = jax.nn.relu(conv(x, params["b"]))
    return x.mean((1, 2)) @ params["head"]


def test_layers_are_saved_and_described_with_the_bits_of_their_rules(tmp_path):
    bits = {"a": 2, "b": 3, "head": 6}
    rules = tuple(jaxqat.Rule(path=path, weight_bits=n) for path, n in bits.items())
    model, variables = calibrated(network, jaxqat.Recipe(rules=rules))
    graph = jaxqat.convert(model, variables, inputs(4))
    assert {p.name: p.weight_bits for p in graph.products()} == bits
    loaded = load(save(graph, tmp_path / "net"))
    assert content(loaded) == content(graph)
    described = jaxqat.describe(model, variables, inputs(4)).layers
    sizes = [row.weight_bytes for row in described]
    assert sizes == [3 * 3 * 3 * 8 // 4, 3 * 3 * 8 * 8 // 2, 8 * 5]
    two_biases_of_zeros = 4 * 8  # Stored once.
    assert graph.size_bytes() == sum(sizes) + (4 + 4) * (8 + 8 + 5) - two_biases_of_zeros
    before, after = (jaxqat.make_executor(each)(inputs(4)) for each in (graph, loaded))
    np.testing.assert_array_equal(before, after)


@pytest.fixture
def packed(tmp_path):
    """Return a folder with a saved 4-bit network, its arrays, and the name of one."""
    folder = save(narrowed(4), tmp_path / "net")
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    return folder, arrays, next(name for name in arrays if name.endswith("stem.weights"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a[:-1], r"216 codes of 4 bits must .* uint8\[108\], got uint8\[107\]"),
        (lambda a: np.append(a, a[:1]), r"got uint8\[109\]"),
        (lambda a: a.reshape(2, -1), r"got uint8\[2, 54\]"),
        (lambda a: a.view(np.int8), r"got int8\[108\]"),
        (lambda a: np.full_like(a, 0x88), r"stem.weights' is not the one that was saved"),
    ],
)
def test_a_damaged_packed_array_raises_an_error_that_names_its_field(packed, damage, message):
    folder, arrays, name = packed
    damaged = {**arrays, name: damage(arrays[name])}
    (folder / "arrays.npz").write_bytes(archive(**damaged))
    sign(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder)
    assert "nodes[1].weights: " in str(caught.value) or "node 'stem'" in str(caught.value)


def test_unused_bits_that_are_not_zero_raise_an_error():
    codes = np.array([1, -1, 1], np.int8)
    packed = pack(codes, 4)
    packed[-1] |= 0x10
    with pytest.raises(ValueError, match="unused bits after 3 codes of 4 bits"):
        unpack(packed, codes.shape, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("packed", value=3), r"weights.packed: must be 2 or 4, got 3"),
        (put("packed", value=2), r"weights: 216 codes of 2 bits must be packed as uint8\[54\]"),
        (put("packed", value=True), r"weights.packed: must be 2 or 4, got True"),
        (put("shape", value=[-1, 216]), r"weights.shape: must be a list of sizes"),
        (put("shape", value=216), r"weights.shape: must be a list of sizes"),
        (put("shape", value=[10**12] * 4), r"codes of 4 bits must be packed as uint8\[5"),
        (put("dtype", value="uint8"), r"weights: the array must be uint8\[.*, got int8"),
        (lambda w: w.pop("packed"), r"weights: the array must be int8.*, got uint8\[108\]"),
    ],
)
def test_packed_weights_with_a_wrong_description_raise_an_error(packed, change, message):
    folder, _, _ = packed
    graph = json.loads((folder / "graph.json").read_text())
    change(graph["nodes"][1]["weights"])
    (folder / "graph.json").write_text(json.dumps(graph))
    sign(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)
