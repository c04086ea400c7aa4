"""A quantized Linen module takes the calls that a Linen module takes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat

ROWS = np.random.default_rng(0).normal(1, 2, size=(16, 12)).astype(np.float32)
KEY = jax.random.key(0)


class Perceptron(nn.Module):
    features: int = 16

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.features, name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(5, name="last")(nn.Dropout(0.1, deterministic=not train)(x))


@pytest.fixture(scope="module")
def calibrated():
    model = jaxqat.quantize(Perceptron(), "int8")
    return model, model.calibrate(model.init(KEY, ROWS), ROWS)


@pytest.mark.parametrize("train", [False, True])
def test_init_with_output_gives_the_variables_of_init_and_a_quantized_result(train):
    model = jaxqat.quantize(Perceptron(), "int8")
    rngs = {"params": KEY, "dropout": jax.random.key(1)}
    result, variables = model.init_with_output(rngs, ROWS, train=train)
    expected = model.init(rngs, ROWS, train=train)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert "intermediates" not in variables
    # A training step from ranges that have seen nothing takes those of its batch.
    empty = model.init_quant(expected, ROWS, train=train, rngs=rngs, mutable=True)
    first, _ = model.apply(empty, ROWS, train=train, rngs=rngs, mutable=["batch_stats", "quant"])
    np.testing.assert_array_equal(result, first)
    real, _ = Perceptron().init_with_output(rngs, ROWS, train=train)
    assert result.shape == real.shape and np.any(result != real)


def test_captured_intermediates_are_those_of_the_quantized_evaluation(calibrated):
    model, variables = calibrated
    result, updates = model.apply(
        variables, ROWS, capture_intermediates=True, mutable=["intermediates"]
    )
    np.testing.assert_array_equal(result, model.apply(variables, ROWS))
    found: Any = updates["intermediates"]
    assert found.keys() == {"__call__", "first", "norm", "last", "hidden", "Dropout_0"}
    np.testing.assert_array_equal(found["last"]["__call__"][0], result)
    codes, grid = model.codes(variables, ROWS), model.record(variables, ROWS).codes
    scale = grid["last", "input"].grid.scale
    steps = codes["last/input"].astype(jnp.float32) - grid["last", "input"].grid.zero
    np.testing.assert_array_equal(found["hidden"][0], steps * scale)


def test_a_filter_chooses_the_intermediates(calibrated):
    model, variables = calibrated
    _, updates = model.apply(
        variables,
        ROWS,
        capture_intermediates=lambda module, name: module.name == "norm",
        mutable=["intermediates", "quant"],
    )
    assert updates["intermediates"].keys() == {"norm", "hidden"}
    assert int(updates["quant"]["last"]["input"]["count"]) == 2


@pytest.mark.parametrize("key", [KEY, {"params": KEY}], ids=["one key", "keys by name"])
def test_tabulate_shows_the_module_and_the_bits_of_its_products(key):
    recipe = jaxqat.Recipe(rules=(jaxqat.Rule(path="last", weight_bits=None, act_bits=None),))
    table = jaxqat.quantize(Perceptron(), recipe).tabulate(key, ROWS, depth=1, train=False)
    assert Perceptron().tabulate(key, ROWS, depth=1, train=False) in table
    assert "first (dense): weights 8 bits, input 8 bits" in table
    assert "last (dense): float, the recipe leaves it in float" in table


def test_quantized_modules_of_equal_modules_and_recipes_are_equal():
    one, same = (jaxqat.quantize(Perceptron(), "int8") for _ in range(2))
    assert one == same and hash(one) == hash(same)
    assert one != jaxqat.quantize(Perceptron(8), "int8")
    assert one != jaxqat.quantize(Perceptron(), "int8_symmetric")


def test_a_compiled_function_of_an_equal_quantized_module_is_compiled_once(calibrated):
    _, variables = calibrated
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, variables, x):
        traces.append(model)
        return model.apply(variables, x)

    for _ in range(2):
        run(jaxqat.quantize(Perceptron(), "int8"), variables, ROWS)
    assert len(traces) == 1
    run(jaxqat.quantize(Perceptron(), "int8_symmetric"), variables, ROWS)
    assert len(traces) == 2


def test_quantized_functions_compare_by_their_function_and_equinox_modules_by_identity():
    def function(params, x):
        return x @ params

    assert jaxqat.quantize(function, "int8") == jaxqat.quantize(function, "int8")
    assert jaxqat.quantize(function, "int8") != jaxqat.quantize(lambda p, x: x @ p, "int8")
    eqx = pytest.importorskip("equinox")
    layers = [eqx.nn.Linear(12, 5, key=jax.random.key(seed)) for seed in range(2)]
    one, other = (jaxqat.quantize(layer, "int8") for layer in layers)
    assert one == one and one != other and len({one, other}) == 2
