"""Public calls that cannot work raise errors of jaxqat that say what to pass instead."""

import importlib.metadata
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList

import jaxqat
from jaxqat import errors
from jaxqat.integer._execute import pallas, pallas_conv
from jaxqat.integer._execute.arithmetic import FixedPoint
from jaxqat.integer._execute.pallas_tiles import Geometry

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(4, 6)).astype(np.float32)
IMAGES = RNG.normal(size=(4, 8, 8, 4)).astype(np.float32)
KERNEL = RNG.normal(size=(6, 3)).astype(np.float32)
VARIABLES = {"params": {"kernel": KERNEL}}


def function(params, x):
    return x @ params["kernel"]


def two_results(params, x):
    return x @ params["kernel"], x.sum(1)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Conv(16, (3, 3), name="conv")(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def bound():
    return jaxqat.calibrate(function, VARIABLES, batches=[ROWS])


@pytest.fixture(scope="module")
def graph(bound):
    return jaxqat.convert(bound, ROWS)


MODELS = {"linen": nn.Dense(3), "function": function}
WITHOUT_VARIABLES = {
    "convert": jaxqat.convert,
    "describe": jaxqat.describe,
    "calibrate": lambda model: jaxqat.calibrate(model, batches=[ROWS]),
    "analyze": lambda model: jaxqat.analyze(model, batches=[ROWS]),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("call", WITHOUT_VARIABLES.values(), ids=WITHOUT_VARIABLES)
def test_a_model_without_its_variables(call, model):
    quantized = jaxqat.quantize(model)
    with pytest.raises(jaxqat.QuantizationError, match="does not hold its variables, and got 0"):
        call(quantized)


@pytest.mark.parametrize("call", [jaxqat.convert, jaxqat.describe])
def test_inputs_in_the_place_of_variables(call):
    with pytest.raises(jaxqat.QuantizationError, match=r"'params', got ndarray: pass them before"):
        call(jaxqat.quantize(function), ROWS)


def test_variables_of_a_module_that_holds_them():
    model = jaxqat.quantize(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(jaxqat.QuantizationError, match="holds its variables, got 1 arguments"):
        model.bind(VARIABLES)


def test_a_model_of_two_results_cannot_be_verified_against_a_graph_of_one(graph):
    model = jaxqat.calibrate(two_results, VARIABLES, batches=[ROWS])
    with pytest.raises(jaxqat.ExecutionError, match=r"returns 2 arrays, the integer network 1"):
        jaxqat.verify(model, graph=graph, batches=[ROWS])


def test_a_model_that_is_not_quantized(graph):
    wanted = r"needs what `jaxqat\.quantize` returned, got function"
    with pytest.raises(jaxqat.QuantizationError, match=f"verify {wanted}"):
        jaxqat.verify(function, VARIABLES, graph=graph, batches=[ROWS])  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxqat.QuantizationError, match=f"analyze {wanted}"):
        jaxqat.analyze(function, VARIABLES, batches=[ROWS])  # pyright: ignore[reportArgumentType]


OF_GRAPHS = {
    "make_executor": (jaxqat.make_executor, jaxqat.ExecutionError),
    "save": (lambda graph: jaxqat.save(graph, "network"), jaxqat.ArtifactError),
    "export_onnx": (lambda graph: jaxqat.export_onnx(graph, "n.onnx"), jaxqat.ExportError),
    "export_stablehlo": (lambda graph: jaxqat.export_stablehlo(graph, "n"), jaxqat.ExportError),
}


@pytest.mark.parametrize("name", OF_GRAPHS)
def test_a_model_in_the_place_of_its_integer_network(name, bound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, error = OF_GRAPHS[name]
    wanted = rf"{name} needs the IntegerGraph that `jaxqat\.convert` returned, got BoundModel"
    with pytest.raises(error, match=wanted):
        call(bound)
    with pytest.raises(jaxqat.ExecutionError, match="verify needs the IntegerGraph"):
        jaxqat.verify(bound, graph=bound, batches=[ROWS])


@pytest.mark.slow
def test_a_batch_that_is_too_large_for_the_kernel(monkeypatch):
    monkeypatch.setattr(pallas.PallasCuda, "interpret", True)
    monkeypatch.setattr(pallas_conv, "LARGEST_TENSOR", 4 * 8 * 8 * 16)
    variables = Network().init(jax.random.key(0), IMAGES)
    model = jaxqat.calibrate(Network(), variables, batches=[IMAGES])
    network = jaxqat.make_executor(jaxqat.convert(model, IMAGES), platform="cuda_pallas")
    np.testing.assert_array_equal(network(IMAGES), model(IMAGES))
    with pytest.raises(jaxqat.ExecutionError, match=r"a batch of 5 .*: split the batch"):
        network(np.concatenate([IMAGES, IMAGES[:1]]))


def test_geometry_and_multipliers_that_no_executor_has():
    with pytest.raises(jaxqat.ExecutionError, match="does not fit an input"):
        Geometry(size=(2, 2), window=(3, 3))
    with pytest.raises(jaxqat.ExecutionError, match=r"multiplier must be below 2\*\*30"):
        FixedPoint.of(np.float32(2.0**31))


def test_a_missing_package(graph, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(jaxqat.MissingPackageError, match=r"pip install -e '(.*)\[onnx\]'") as error:
        jaxqat.export_onnx(graph, tmp_path / "network.onnx")
    assert isinstance(error.value, jaxqat.JaxqatError) and isinstance(error.value, ImportError)
    checkout = Path(__file__).parents[1]  # These tests run from one.
    assert f"`pip install -e '{checkout}[onnx]'`" in str(error.value)


GIT = {"url": "https://example.org/jaxqat.git"}
SOURCES = {
    "index": (None, "pip install 'jaxqat[onnx,openvino]'"),
    "folder": (
        {"url": "file:///home/a%20b/jaxqat", "dir_info": {}},
        "pip install '/home/a b/jaxqat[onnx,openvino]'",
    ),
    "branch": (
        GIT | {"vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": "0123"}},
        "pip install 'jaxqat[onnx,openvino] @ git+https://example.org/jaxqat.git@main'",
    ),
    "commit": (
        GIT | {"vcs_info": {"vcs": "git", "commit_id": "0123"}},
        "pip install 'jaxqat[onnx,openvino] @ git+https://example.org/jaxqat.git@0123'",
    ),
    "wheel": (
        {"url": "https://example.org/jaxqat-0.1.0-py3-none-any.whl", "archive_info": {}},
        "pip install 'jaxqat[onnx,openvino] @ https://example.org/jaxqat-0.1.0-py3-none-any.whl'",
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_command_that_adds_extras_names_the_source_of_the_package(
    source, tmp_path, monkeypatch
):
    """As in an environment: the package, and pip's record of it (PEP 610)."""
    record, command = SOURCES[source]
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "jaxqat" / "errors.py"))
    info = tmp_path / "jaxqat-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: jaxqat\nVersion: 0.1.0\n")
    if record is not None:
        (info / "direct_url.json").write_text(json.dumps(record))
    found = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", {"jaxqat": found}.__getitem__)
    assert errors.install_command("onnx,openvino") == command


class Normalized(nn.Module):
    """A network with batch norm, which can be trained."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


PIXELS = RNG.integers(0, 256, size=(4, 8, 8, 4)).astype(np.uint8)


def normalize(images):
    return (images.astype(np.float32) / 255 - 0.5) / 0.25


@pytest.fixture(scope="module")
def network():
    """A calibrated network of normalized pixels, and its integer network, which takes uint8."""
    images = normalize(PIXELS)
    variables = Normalized().init(jax.random.key(0), images)
    model = jaxqat.calibrate(Normalized(), variables, batches=[images])
    return model, jaxqat.convert(model, images, preprocess=normalize)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mutable", [False, ["batch_stats"], ["batch_stats", "quant"]])
def test_a_linen_module_that_was_not_calibrated(compiled, mutable):
    model = jaxqat.quantize(Normalized())
    images = normalize(PIXELS)
    variables = model.init(jax.random.key(0), images)
    assert set(variables) == {"params", "batch_stats"}
    step = lambda v, x: model.apply(v, x, train=bool(mutable), mutable=mutable)  # noqa: E731
    wanted = "pass mutable=" if mutable == ["batch_stats"] else "Call `calibrate` on a few batches"
    with pytest.raises(jaxqat.QuantizationError, match=wanted):
        (jax.jit(step) if compiled else step)(variables, images)


def test_frozen_ranges_that_have_seen_no_data():
    model, images = jaxqat.quantize(Normalized()), normalize(PIXELS)
    variables = model.init_quant(model.init(jax.random.key(0), images), images)
    with pytest.raises(jaxqat.QuantizationError, match=r"'conv/input' has seen no data \(3 of 3"):
        model.apply(variables, images)
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats", "quant"])
    assert np.isfinite(model.apply({**variables, **updates}, images)).all()


def test_batch_norm_that_trains_while_ranges_stand_still(network):
    model, images = jaxqat.quantize(Normalized()), normalize(PIXELS)
    step = lambda mutable: model.apply(  # noqa: E731
        network[0].variables, images, train=True, mutable=mutable
    )
    for mutable in ("batch_stats", ["batch_stats", "quant_params"]):
        with pytest.raises(
            jaxqat.QuantizationError, match=r"pass mutable=\['batch_stats', 'quant'\]"
        ):
            step(mutable)
    _, updates = step(DenyList(("quant", "quant_params")))
    assert "batch_stats" in updates and "quant" not in updates


UINT8 = {
    "calibrate": lambda model: jaxqat.calibrate(
        Normalized(), {k: model.variables[k] for k in ("params", "batch_stats")}, batches=[PIXELS]
    ),
    "init": lambda model: model.model.init(jax.random.key(0), PIXELS),
    "convert": lambda model: jaxqat.convert(model, PIXELS),
    "convert with preprocess": lambda m: jaxqat.convert(m, PIXELS, preprocess=normalize),
    "describe": lambda model: jaxqat.describe(model, PIXELS),
    "call": lambda model: model(PIXELS),
}


@pytest.mark.parametrize("name", UINT8)
def test_uint8_images_in_the_place_of_the_models_input(name, network):
    with pytest.raises(jaxqat.QuantizationError, match=r"uint8, and 'conv/input'.*normalized"):
        UINT8[name](network[0])


def test_a_model_that_normalizes_pixels_itself_takes_uint8():
    model = jaxqat.calibrate(
        lambda p, x: jax.numpy.float32(x).mean((1, 2)) / 255 @ p, {"params": KERNEL[:4]},
        batches=[PIXELS],
    )  # fmt: skip
    assert np.isfinite(model(PIXELS)).all()


def test_verify_of_uint8_images_without_the_models_preprocess(network):
    model, graph = network
    with pytest.raises(jaxqat.ExecutionError, match=r"that `convert` was given, preprocess="):
        jaxqat.verify(model, graph=graph, batches=[PIXELS])
    found = jaxqat.verify(model, graph=graph, batches=[PIXELS], preprocess=normalize)
    assert found.differing == 0


@pytest.mark.parametrize("sparse", [False, True], ids=["photograph", "digits on black"])
def test_float_pixel_values_in_an_integer_network(network, sparse):
    graph = network[1]
    pixels = PIXELS.astype(np.float32)
    if sparse:
        pixels[:, 2:] = 0
    else:
        pixels = pixels * np.float32(0.99)  # As after a resize: not whole numbers.
    with pytest.raises(jaxqat.ExecutionError, match=r"of 0 to 25\d.*: pass uint8 images, which"):
        jaxqat.make_executor(graph)(pixels)
    run = jaxqat.make_executor(graph)
    np.testing.assert_array_equal(run(normalize(PIXELS)), network[0](normalize(PIXELS)))
    outlier = normalize(PIXELS)
    outlier[0, 0, 0, 0] = 100.0  # Far out, but no pixel values.
    assert np.isfinite(jaxqat.make_executor(graph)(np.abs(outlier))).all()


def test_a_network_of_raw_pixel_values_takes_them():
    pixels = PIXELS.astype(np.float32)
    model = jaxqat.calibrate(Normalized(), Normalized().init(jax.random.key(0), pixels),
                             batches=[pixels])  # fmt: skip
    assert np.isfinite(jaxqat.make_executor(jaxqat.convert(model, pixels))(pixels)).all()


def test_a_class_a_width_and_an_array_in_the_place_of_model_recipe_and_batches(network):
    with pytest.raises(jaxqat.QuantizationError, match=r"the class Normalized \(pass an instance"):
        jaxqat.quantize(Normalized)  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxqat.RecipeError, match=r"got int 8; for other bits, pass Recipe\(weight"):
        jaxqat.quantize(Normalized(), 8)  # pyright: ignore[reportCallIssue, reportArgumentType]
    model, graph = network
    for call in (
        lambda: jaxqat.verify(model, graph=graph, batches=normalize(PIXELS)),
        lambda: jaxqat.analyze(model, batches=normalize(PIXELS)),
        lambda: jaxqat.calibrate(Normalized(), model.variables, batches=normalize(PIXELS)),
    ):
        with pytest.raises(jaxqat.QuantizationError, match=r"is an array .*: pass \[array\]"):
            call()


def test_a_file_in_the_place_of_a_saved_network(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"onnx")
    with pytest.raises(
        jaxqat.ArtifactError, match=r"a.onnx: .*it is a file, .* folder that `jaxqat.save"
    ):
        jaxqat.load(path)
    with pytest.raises(jaxqat.ArtifactError, match="there is no such folder"):
        jaxqat.load(tmp_path / "none")
