"""Post-training quantization: what is observed, and what comes out of it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="out")(nn.relu(nn.Dense(16, name="in")(x)))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [rng.normal(scale=1 + i, size=(16, 12)).astype(np.float32) for i in range(3)]


@pytest.fixture(scope="module")
def variables():
    return Perceptron().init(jax.random.key(0), jnp.zeros((1, 12)))


def test_ranges_are_the_means_of_the_batches_extremes(variables, batches):
    calibrated = jaxqat.calibrate(Perceptron(), variables, batches=batches).variables
    layer = variables["params"]["in"]
    hidden = [np.maximum(x @ layer["kernel"] + layer["bias"], 0) for x in batches]
    for name, tensors in (("in", batches), ("out", hidden)):
        found = calibrated["quant"][name]["input"]
        # Matrix products of 12 terms, and three steps of a float32 mean.
        np.testing.assert_allclose(found["min"], np.mean([x.min() for x in tensors]), rtol=2**-20)
        np.testing.assert_allclose(found["max"], np.mean([x.max() for x in tensors]), rtol=2**-20)
        assert int(found["count"]) == 3
    assert "quant" not in variables
    assert calibrated["params"] is variables["params"]


def test_without_training_the_integer_network_is_close_to_the_float_one(variables, batches):
    network = jaxqat.calibrate(Perceptron(), variables, batches=batches)
    graph = jaxqat.convert(network, batches[0])
    check = jaxqat.verify(network, graph=graph, batches=batches)
    assert check.failures == ()
    expected: Any = Perceptron().apply(variables, batches[0])
    actual = jaxqat.make_executor(graph)(batches[0])
    # 8 bits: a step is 1/255 of a range, its error at most half of one, in each of two layers.
    assert np.linalg.norm(actual - expected) < 0.02 * np.linalg.norm(expected)


def test_functions_and_nnx_modules_are_calibrated_alike(variables, batches):
    function = lambda params, x: Perceptron().apply({"params": params}, x)  # noqa: E731
    network = jaxqat.calibrate(function, variables, batches=batches)
    of_module = jaxqat.calibrate(Perceptron(), variables, batches=batches)
    jax.tree.map(np.testing.assert_array_equal, network.variables, of_module.variables)
    by_function = jaxqat.make_executor(jaxqat.convert(network, batches[0]))

    module = nnx.Sequential(
        nnx.Linear(12, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 5, rngs=nnx.Rngs(1))
    )
    for layer, name in ((module.layers[0], "in"), (module.layers[2], "out")):
        parameters = variables["params"][name]
        layer.kernel[...], layer.bias[...] = parameters["kernel"], parameters["bias"]
    quantized = jaxqat.calibrate(module, batches=batches)
    by_module = jaxqat.make_executor(jaxqat.convert(quantized, batches[0]))
    np.testing.assert_array_equal(by_module(batches[1]), by_function(batches[1]))


def test_several_inputs_are_given_as_a_tuple(batches):
    def function(params, x, y):
        return x @ params["a"]["kernel"] + y @ params["b"]["kernel"]

    rng = np.random.default_rng(1)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=(12, 4)))} for name in "ab"}
    pairs = [(batches[0], batches[1])]
    ranges = jaxqat.calibrate(function, {"params": params}, batches=pairs).variables["quant"]
    assert float(ranges["a"]["input"]["max"]) == batches[0].max()
    assert float(ranges["b"]["input"]["max"]) == batches[1].max()


@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_preprocessing_is_compiled_in_front_of_the_model(variables, recipe):
    """The ranges are those of a model that starts with the same preprocessing."""
    pixels = np.random.default_rng(2).integers(0, 256, (3, 16, 12)).astype(np.uint8)

    def preprocess(pixels):
        return (pixels.astype(jnp.float32) / 255 - 0.45) / 0.22

    found = jaxqat.calibrate(
        Perceptron(), variables, batches=list(pixels), recipe=recipe, preprocess=preprocess
    )
    model = jaxqat.quantize(Perceptron(), recipe)
    compiled = jax.jit(lambda variables, pixels: model.calibrate(variables, preprocess(pixels)))
    expected = model.init_quant(variables, preprocess(pixels[0]))
    for batch in pixels:
        expected = compiled(expected, batch)
    jax.tree.map(np.testing.assert_array_equal, dict(found.variables), expected)
    # What is quantized takes the preprocessed values, not the pixels.
    assert float(found.variables["quant"]["in"]["input"]["max"]) < 3


def test_preprocessing_may_make_several_inputs():
    def function(params, x, y):
        return x @ params["a"] + y @ params["b"]

    x = np.random.default_rng(3).normal(size=(8, 6)).astype(np.float32)
    params = {name: jnp.ones((6, 2)) for name in "ab"}
    network = jaxqat.calibrate(
        function, {"params": params}, batches=[x], preprocess=lambda x: (x, 2 * x)
    )
    ranges = network.variables["quant"]
    assert float(ranges["a"]["input"]["max"]) == x.max()
    assert float(ranges["b"]["input"]["max"]) == 2 * x.max()


def test_no_batch_is_an_error_that_says_what_is_needed(variables):
    with pytest.raises(jaxqat.QuantizationError, match=r"`batches` is empty; pass a few batches"):
        jaxqat.calibrate(Perceptron(), variables, batches=[])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named_by_their_tensor(variables, batches, value):
    bad = batches[0].copy()
    bad[3, 4] = value
    with pytest.raises(jaxqat.QuantizationError, match=r"in/input.* not finite"):
        jaxqat.calibrate(Perceptron(), variables, batches=[batches[0], bad])
    model = jaxqat.quantize(Perceptron())
    with pytest.raises(jaxqat.QuantizationError, match=r"in/input.* not finite"):
        model.calibrate(variables, bad)
    # Inside of `jit` nothing can be looked at; what uses the ranges refuses them.
    ranges = jax.jit(model.calibrate)(variables, bad)
    with pytest.raises(jaxqat.ConversionError, match=r"in/input: its range is not finite"):
        jaxqat.convert(model, ranges, bad)


def test_one_array_in_place_of_batches_is_refused_everywhere(variables, batches):
    network = jaxqat.calibrate(Perceptron(), variables, batches=batches)
    graph = jaxqat.convert(network, batches[0])
    for call in (
        lambda given: jaxqat.calibrate(Perceptron(), variables, batches=given),
        lambda given: jaxqat.verify(network, graph=graph, batches=given),
        lambda given: jaxqat.analyze(network, batches=given),
    ):
        with pytest.raises(jaxqat.QuantizationError, match=r"array of the shape .* \[array\]"):
            call(batches[0])


@pytest.mark.slow
def test_a_constant_zero_tensor_quantizes_to_zeros(variables):
    zeros = np.zeros((4, 12), np.float32)
    network = jaxqat.calibrate(Perceptron(), variables, batches=[zeros])
    codes = network.codes(zeros)
    np.testing.assert_array_equal(codes["in/input"], np.full((4, 12), -128, np.int8))
    logits = network(zeros)
    expected: Any = Perceptron().apply(variables, zeros)
    # Biases of a few tenths, rounded to accumulator units far below that.
    np.testing.assert_allclose(logits, expected, atol=0.02)


@pytest.mark.parametrize("recipe", ["int8", "int8_symmetric", "int8_dynamic", "w4a4_lsq"])
@pytest.mark.parametrize("value", [3.0, -2.0, 0.0])
def test_a_constant_tensor_has_finite_results_and_gradients(value, recipe):
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=(6, 5)).astype(np.float32), np.full((4, 6), value, np.float32)
    function = lambda w, x: x @ w  # noqa: E731
    network = jaxqat.calibrate(function, {"params": weights}, batches=[x], recipe=recipe)
    found, gradient = jax.value_and_grad(
        lambda w: jnp.sum(network.with_variables(params=w)(x) ** 2)
    )(weights)
    assert np.isfinite(found) and np.isfinite(gradient).all()
    assert np.any(np.asarray(gradient)) == (value != 0)
    if value == 0:
        np.testing.assert_array_equal(network(x), 0)
    elif recipe != "w4a4_lsq":
        # Six products: half a code of the weight (|w| < 3 of 127 codes), and of the input, which
        # is one end of its grid up to the rounding of the zero point.
        bound = 6 * abs(value) * (1.5 / 127 + 3 * 0.5 / 127)
        assert np.abs(np.asarray(network(x)) - x @ weights).max() < bound


def test_ranges_that_the_variables_hold_are_not_used(batches, variables):
    stale = jaxqat.quantize(Perceptron(), "int8").calibrate(variables, 16 * batches[0])
    found = [
        jaxqat.calibrate(Perceptron(), given, batches=batches).variables["quant"]
        for given in (variables, stale)
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    learned = jaxqat.calibrate(Perceptron(), stale, batches=batches, recipe="w4a4_lsq")
    assert learned.variables["quant_params"]


def test_ranges_of_a_recipe_that_learns_nothing_are_refused_by_one_that_does(batches, variables):
    plain = jaxqat.quantize(Perceptron(), "int8").calibrate(variables, batches[0])
    model = jaxqat.quantize(Perceptron(), "w4a4_lsq")
    with pytest.raises(jaxqat.JaxqatError, match=r"'quant_params' lacks .* calibrate anew"):
        model.calibrate(plain, batches[0])


def test_a_rule_that_matches_nothing_is_an_error_for_calibrated_variables_too(batches, variables):
    plain = jaxqat.quantize(Perceptron(), "int8").calibrate(variables, batches[0])
    recipe = jaxqat.Recipe(rules=(jaxqat.Rule(path="nope", weight_bits=4),))
    with pytest.raises(jaxqat.RecipeError, match="nope"):
        jaxqat.quantize(Perceptron(), recipe).calibrate(plain, batches[0])
