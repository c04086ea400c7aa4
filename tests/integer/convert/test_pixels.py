"""A uint8 input is codes: what a model computes of it first is a table of the integer network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer.test_islands import PARAMS, conv, head
from references import integer_graph, sqnr

import jaxqat
from jaxqat.export import run_onnx
from jaxqat.integer import graph as g
from jaxqat.integer._execute.executor import PLATFORMS

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
X[0, 0, 0], X[0, 0, 1] = 0, 255
MEAN, STD = np.array([0.49, 0.48, 0.45], np.float32), np.array([0.25, 0.24, 0.26], np.float32)


def normalized(x):
    return (x.astype(jnp.float32) / 255 - MEAN) / STD


STARTS = {
    "divided": lambda x: x / 255,
    "normalized": normalized,
    "mean of pixels": lambda x: (x - 255 * MEAN) * (1 / (255 * STD)),
    "bfloat16": lambda x: (x.astype(jnp.bfloat16) / 127.5 - 1).astype(jnp.float32),
    "gamma": lambda x: (x / 255) ** 2.2,
    "moved": lambda x: jnp.flip(x.astype(jnp.float32), 1).transpose(0, 2, 1, 3) / 255 - 0.5,
}


def network(start, p, x):
    return head(p, jax.nn.relu(conv(start(x), p["second"] if x.shape[-1] == 8 else p["first"])))


def calibrated(start):
    params = {"first": PARAMS["first"], "head": PARAMS["head"]}
    function = functools.partial(network, start)
    return function, jaxqat.calibrate(function, {"params": params}, batches=[X], recipe="int8")


@pytest.mark.parametrize("name", STARTS)
def test_a_network_of_pixels_is_integer_from_the_first_operation(name, tmp_path):
    function, model = calibrated(STARTS[name])
    graph = jaxqat.convert(model, X[:2], strict=True)
    graph = jaxqat.load(jaxqat.save(graph, tmp_path / "network"))
    assert (graph.input_type, graph.float_ops) == ("uint8", ())
    check = jaxqat.verify(model, graph=graph, batches=[X, X[::-1]])
    assert (check.differing, check.failures) == (0, ())

    codes, result = integer_graph.run(graph, X)
    for platform in PLATFORMS:
        if platform != "cuda_pallas":  # Its kernels need a GPU.
            found = jaxqat.make_executor(graph, platform=platform).codes(X)
            for key, wanted in codes.items():
                np.testing.assert_array_equal(found[key], wanted, err_msg=f"{platform} {key}")
    np.testing.assert_array_equal(np.asarray(jaxqat.make_executor(graph)(X)), result)
    path = jaxqat.export_onnx(graph, tmp_path / "network.onnx")
    found, onnx_codes = run_onnx(path, X, expose=True)
    np.testing.assert_array_equal(found, result)
    for key, wanted in codes.items():
        np.testing.assert_array_equal(onnx_codes[key], wanted, err_msg=key)
    # Three quantized tensors of 8 bits.
    assert sqnr.decibels(function(PARAMS, X), result) > 30


@pytest.mark.parametrize("name", ["normalized", "mean of pixels"])
def test_a_table_holds_the_code_of_each_pixel_value(name):
    _, model = calibrated(STARTS[name])
    graph = jaxqat.convert(model, X[:2])
    (node,) = (node for node in graph.nodes if isinstance(node, g.Table))
    out = graph.tensors[node.output]
    every = np.arange(256.0)[:, None]
    mean, std = MEAN.astype(np.float64), STD.astype(np.float64)
    units = (every / 255 - mean) / std / float(out.scale)
    wanted = np.clip(np.round(units) + out.zero_point, out.low, out.high)
    # Of float32 operations on units below 2**8; nearer to a tie, either code is right.
    clear = np.abs(np.abs(units - np.floor(units)) - 0.5) > 2**-12
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(node.table[clear], wanted[clear])


def test_the_network_is_that_of_a_normalization_outside_of_the_model(tmp_path):
    """The same weights and ranges, with `preprocess` in place of a start inside."""
    _, inside = calibrated(normalized)
    outside = jaxqat.calibrate(
        functools.partial(network, lambda x: x), inside.variables, batches=[normalized(X)]
    )
    graphs = [
        jaxqat.convert(inside, X[:2]),
        jaxqat.convert(outside, np.asarray(normalized(X[:2])), preprocess=normalized),
    ]
    results = [np.asarray(jaxqat.make_executor(graph)(X)) for graph in graphs]
    # One last bit of the normalization can change a code; one in 1,000 would show here.
    assert sqnr.decibels(*results) > 50


MIXED = {
    "a mean": lambda y: y - y.mean((1, 2), keepdims=True),
    "sharpened": lambda y: y + 0.5 * (y - nn.avg_pool(y, (3, 3), (1, 1), "SAME")),
    "shifted": lambda y: y + jnp.roll(y, 1, 1),
    "a softmax": lambda y: y + jax.nn.softmax(y),
    "a residual convolution": lambda y: y + conv(y, PARAMS["first"])[..., :3],
}


@pytest.mark.parametrize("name", MIXED)
def test_a_sum_of_scaled_pixels_and_of_something_else_is_rounded_once_everywhere(name):
    function, model = calibrated(lambda x: MIXED[name](x / 255))
    graph = jaxqat.convert(model, X[:2])
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert (check.differing, check.failures) == (0, ())
    # A sum in another order can move a code to its neighbour at a tie.
    assert check.island_differing <= 2
    assert sqnr.decibels(function(PARAMS, X), jaxqat.make_executor(graph)(X)) > 30


def test_pixels_of_another_type_are_an_error():
    """The model computes them in float, and values beyond 255 have no code."""
    _, model = calibrated(normalized)
    graph = jaxqat.convert(model, X[:2])
    with pytest.raises(jaxqat.ExecutionError, match=r"images must be uint8, as .* got int32"):
        jaxqat.make_executor(graph)(X.astype(np.int32))
    with pytest.raises(jaxqat.ExecutionError, match="images must be uint8"):
        jaxqat.verify(model, graph=graph, batches=[X.astype(np.int32)])


@pytest.mark.parametrize("form", ["float", "uint8"])
def test_exported_files_take_the_pixels_whatever_the_input_is_called(form, tmp_path):
    _, model = calibrated(normalized)
    graph = jaxqat.convert(model, X[:2])
    expected = np.asarray(jaxqat.make_executor(graph)(X))
    path = jaxqat.export_onnx(graph, tmp_path / "network.onnx", input=form)
    np.testing.assert_array_equal(run_onnx(path, X)[0], expected)
    path = jaxqat.export_stablehlo(graph, tmp_path / "network", input=form)
    np.testing.assert_array_equal(jaxqat.load_stablehlo(path)(X), expected)


def test_uint8_arithmetic_before_the_cast_is_computed_as_it_is():
    """It wraps around, which no function of codes does."""
    function, model = calibrated(lambda x: (x + np.uint8(100)).astype(jnp.float32) / 255)
    graph = jaxqat.convert(model, X[:2])
    assert graph.float_ops
    assert sqnr.decibels(function(PARAMS, X), jaxqat.make_executor(graph)(X)) > 30
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert (check.differing, check.failures) == (0, ())


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(256, 8, name="words")(x)
        return nn.Dense(5, name="head")(x.mean(1))


def test_tokens_of_uint8_are_looked_up_as_they_are(tmp_path):
    tokens = X[:, 0, :, 0]
    variables = Tokens().init(jax.random.key(0), tokens)
    model = jaxqat.calibrate(Tokens(), variables, batches=[tokens])
    graph = jaxqat.convert(model, tokens)
    assert graph.input_type == "uint8" and "pixels" not in graph.tensors
    check = jaxqat.verify(model, graph=graph, batches=[tokens])
    assert (check.differing, check.failures) == (0, ())
    result = np.asarray(jaxqat.make_executor(graph)(tokens))
    path = jaxqat.export_onnx(graph, tmp_path / "network.onnx")
    np.testing.assert_allclose(run_onnx(path, tokens)[0], result, rtol=1e-5, atol=1e-6)


def test_preprocess_for_a_model_that_takes_pixels_is_an_error():
    _, model = calibrated(normalized)
    with pytest.raises(jaxqat.ConversionError, match="this model takes uint8 itself"):
        jaxqat.convert(model, X[:2], preprocess=lambda x: x)
