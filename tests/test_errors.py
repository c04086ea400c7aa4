"""Public calls that cannot work raise errors of jaxqat that say what to pass instead."""

import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxqat
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


def test_several_results_cannot_be_verified(graph):
    model = jaxqat.calibrate(two_results, VARIABLES, batches=[ROWS])
    with pytest.raises(jaxqat.ExecutionError, match=r"needs a model with one result, .* has 2"):
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
    with pytest.raises(jaxqat.MissingPackageError, match=r"pip install 'jaxqat\[onnx\]'") as error:
        jaxqat.export_onnx(graph, tmp_path / "network.onnx")
    assert isinstance(error.value, jaxqat.JaxqatError) and isinstance(error.value, ImportError)
