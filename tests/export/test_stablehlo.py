"""StableHLO files give the same integers on all platforms, without the model's source."""

import re
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from integer import graphs
from jax import export
from references import integer_graph

import jaxqat
from jaxqat.errors import ExportError
from jaxqat.export._stablehlo import (
    _MAGIC,
    _opened,
    _sealed,
    export_stablehlo,
    load_stablehlo,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network():
    return graphs.build("residual", symmetric=False)


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("stablehlo") / "network.stablehlo"
    export_stablehlo(network, path, input="uint8")
    return path


@pytest.mark.parametrize("symmetric", [False, True], ids=["int8", "int8_symmetric"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "mlp"])
def test_a_loaded_file_gives_the_bits_of_the_integer_network(name, symmetric, tmp_path):
    graph = graphs.build(name, symmetric=symmetric)
    images = graphs.normalized(graphs.pixels(graph, 5)).astype(np.float32)
    export_stablehlo(graph, tmp_path / "network")
    loaded = load_stablehlo(tmp_path / "network")
    for batch in (images, images[:1]):
        _, expected = integer_graph.run(graph, batch)
        np.testing.assert_array_equal(np.asarray(loaded(batch)), expected)


def test_uint8_images_and_a_fixed_batch(network, tmp_path):
    pixels = graphs.pixels(network, 3)
    export_stablehlo(network, tmp_path / "network", input="uint8", batch=3, platforms=("cpu",))
    loaded = load_stablehlo(tmp_path / "network")
    _, expected = integer_graph.run(network, pixels)
    np.testing.assert_array_equal(np.asarray(loaded(pixels)), expected)
    with pytest.raises(ExportError, match=r"uint8 of the shape \(3, .* got uint8 \(1, "):
        loaded(pixels[:1])


def test_a_network_of_tokens_takes_integers(tmp_path):
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3, name="head")(nn.Embed(9, 8, name="embed")(tokens).mean(1))

    tokens = np.random.default_rng(0).integers(0, 9, (6, 4))
    variables = Tokens().init(jax.random.key(0), tokens)
    model = jaxqat.calibrate(Tokens(), variables, batches=[tokens])
    graph = jaxqat.convert(model, tokens)
    path = export_stablehlo(graph, tmp_path / "network", platforms=("cpu",))
    assert path == tmp_path / "network"
    loaded = load_stablehlo(path)
    assert loaded.description["inputs"] == [{"path": [0], "shape": [4], "dtype": "int32"}]
    assert loaded.description["batch"] is None
    assert loaded.description["outputs"] == [{"path": [], "shape": [3], "dtype": "float32"}]
    expected = jaxqat.make_executor(graph)(tokens)
    for batch in (tokens, tokens.astype(np.int32)):
        np.testing.assert_array_equal(np.asarray(loaded(batch)), expected)
    with pytest.raises(ExportError, match=r"images must be int32 .* got float32 \(6, 4\)"):
        loaded(tokens.astype(np.float32))


def test_the_description_has_the_type_of_the_result(tmp_path):
    def function(params, x):
        return (x @ params["kernel"]).argmax(-1)

    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    model = jaxqat.calibrate(function, {"params": {"kernel": rows[:4, :3]}}, batches=[rows])
    graph = jaxqat.convert(model, rows)
    loaded = load_stablehlo(export_stablehlo(graph, tmp_path / "network", platforms=("cpu",)))
    assert loaded.description["outputs"] == [{"path": [], "shape": [], "dtype": "int32"}]
    np.testing.assert_array_equal(np.asarray(loaded(rows)), model(rows))


def test_a_file_needs_neither_jaxqat_nor_the_model(network, file, tmp_path):
    pixels = graphs.pixels(network, 2)
    np.save(tmp_path / "pixels.npy", pixels)
    script = f"""
import sys
import numpy as np
from jax import export
program = export.deserialize(bytearray(open({str(file)!r}, "rb").read()))
np.save({str(tmp_path / "out.npy")!r}, program.call(np.load({str(tmp_path / "pixels.npy")!r})))
assert "jaxqat" not in sys.modules and "flax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    _, expected = integer_graph.run(network, pixels)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_a_file_for_three_platforms_holds_its_weights_once(tmp_path):
    graph = graphs.resnet18(16, 8)
    export_stablehlo(graph, tmp_path / "network")
    exported = export.deserialize(bytearray((tmp_path / "network").read_bytes()))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    size = (tmp_path / "network").stat().st_size
    # The program of three platforms, without its weights, is 172 kB for the ResNet-18's 30 nodes.
    assert graph.size_bytes() < size < graph.size_bytes() + 2**18


def test_a_file_names_no_path_of_this_machine(file):
    assert str(__file__).encode() not in file.read_bytes()
    assert b"site-packages" not in file.read_bytes()


def test_every_damage_is_detected(file, tmp_path):
    content = file.read_bytes()
    damaged = tmp_path / "network"
    for position in np.random.default_rng(0).integers(0, len(content), 40):
        broken = bytearray(content)
        broken[position] ^= 1
        damaged.write_bytes(broken)
        with pytest.raises(ExportError, match=r"checksum|truncated"):
            load_stablehlo(damaged)
    for length in (0, 10, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        with pytest.raises(ExportError, match=r"checksum|truncated"):
            load_stablehlo(damaged)


def test_a_changed_length_of_the_description_is_detected(file, tmp_path):
    content = file.read_bytes()
    damaged = tmp_path / "network"
    for position in range(8):  # Between the description and the checksum.
        broken = bytearray(content)
        broken[len(content) - len(_MAGIC) - 32 - 8 + position] ^= 1
        damaged.write_bytes(broken)
        with pytest.raises(ExportError, match="checksum"):
            load_stablehlo(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["inputs"][0].update(shape=[9, 9, 3]), "does not fit its program"),
        (lambda d: d["inputs"][0].update(dtype="int64"), "does not fit its program"),
        (lambda d: d["outputs"][0].update(shape="many"), "does not fit its program"),
        (lambda d: d.update(platforms=["cpu"]), "does not fit its program"),
        (lambda d: d.update(metadata=None), "does not fit its program"),
        (lambda d: d["inputs"][0].update(path=[]), "begins with an argument"),
        (lambda d: d["inputs"].append(d["inputs"][0]), "must be unique"),
        (lambda d: d.update(batch=4), "does not fit its program"),
        (lambda d: d.pop("inputs"), "is incomplete"),
        (lambda d: d.update(outputs=[]), "is incomplete"),
    ],
)
def test_a_resealed_description_of_another_program_is_refused(file, tmp_path, change, message):
    program, description = _opened(file, file.read_bytes())
    change(description)
    (tmp_path / "network").write_bytes(_sealed(program, description))
    with pytest.raises(ExportError, match=message):
        load_stablehlo(tmp_path / "network")


def test_resealed_damage_of_the_program_is_an_export_error_or_harmless(file, tmp_path):
    program, description = _opened(file, file.read_bytes())
    for position in np.random.default_rng(1).integers(0, len(program), 12):
        broken = bytearray(program)
        broken[position] ^= 1
        (tmp_path / "network").write_bytes(_sealed(bytes(broken), description))
        try:
            load_stablehlo(tmp_path / "network")
        except ExportError as error:
            assert str(tmp_path / "network") in str(error)
    for broken in (b"", b"\0" * 64, program[:100], b"\xff" * 100):
        (tmp_path / "network").write_bytes(_sealed(broken, description))
        with pytest.raises(ExportError, match="cannot read it"):
            load_stablehlo(tmp_path / "network")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ("cpu", "gpu")}, "among cpu, cuda, tpu"),
        ({"platforms": ()}, "among cpu, cuda, tpu"),
        ({"input": "int8"}, "'float' or 'uint8', got 'int8'"),
    ],
)
def test_wrong_options_are_named(network, tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_stablehlo(network, tmp_path / "network", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_or_impossible_path_raises_an_error(network, file, tmp_path):
    before = file.read_bytes()
    with pytest.raises(ExportError, match="already exists"):
        export_stablehlo(network, file)
    assert file.read_bytes() == before
    with pytest.raises(ExportError, match="missing does not exist"):
        export_stablehlo(network, tmp_path / "missing" / "network")
    with pytest.raises(ExportError, match="cannot be read"):
        load_stablehlo(tmp_path / "nothing")


def test_the_configuration_of_jax_is_restored(network, tmp_path):
    names = (
        "jax_include_full_tracebacks_in_locations",
        "jax_hlo_source_file_canonicalization_regex",
    )
    before = [getattr(jax.config, name) for name in names]
    export_stablehlo(network, tmp_path / "network")
    assert [getattr(jax.config, name) for name in names] == before


def test_a_file_holds_no_folder_of_a_source_file(file):
    content = file.read_bytes()
    sources = set(re.findall(rb"[ -~]*\.py\b", content))
    assert b"base.py" in sources  # The search does find names of source files.
    assert not [name for name in sources if b"/" in name or b"\\" in name]
