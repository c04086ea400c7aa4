"""Layers that are called more than once: each call has a range, told from the others by order."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat

RNG = np.random.default_rng(0)
# The second tensor of each pair is eight times as wide: with the other's range it would be clipped.
ROWS = RNG.normal(size=(32, 12)).astype(np.float32)
KERNEL = RNG.normal(0, 0.3, (12, 12)).astype(np.float32)


def pair(layer, x, train):
    """Return the main result; in training an auxiliary call of the layer comes before it."""
    aux = layer(x) if train else 0.0
    return layer(jnp.tanh(x) * 8), aux


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return pair(nn.Dense(12, name="shared"), x, train)


class NNX(nnx.Module):
    def __init__(self):
        self.shared = nnx.Linear(12, 12, rngs=nnx.Rngs(0))

    def __call__(self, x, train):
        return pair(self.shared, x, train)


class Equinox(eqx.Module):
    shared: eqx.nn.Linear

    def __init__(self):
        self.shared = eqx.nn.Linear(12, 12, key=jax.random.key(0))

    def __call__(self, x, train):
        return pair(self.shared, x, train)


def function(params, x, train):
    return pair(lambda x: x @ params["shared"]["kernel"], x, train)


def linen_variables(module, *inputs):
    key = jax.random.key(0)
    return {"params": module.init(key, *inputs)["params"]}


def bound(kind, train) -> Any:
    """A model of this kind in one mode, without ranges."""
    if kind == "linen":
        variables = linen_variables(Linen(), ROWS, True)
        return jaxqat.quantize(Linen()).bind(variables, train=train)
    if kind == "nnx":
        return jaxqat.quantize(NNX()).bind(train=train)
    if kind == "equinox":
        mapped: Any = lambda module, x, train: jax.vmap(lambda x: module(x, train))(x)  # noqa: E731
        return jaxqat.quantize(mapped).bind({"params": Equinox()}, train=train)
    params = {"shared": {"kernel": KERNEL}}
    return jaxqat.quantize(function).bind({"params": params}, train=train)


KINDS = ("linen", "nnx", "equinox", "function")
MESSAGE = r"made with {} calls of the layer 'shared', and this call of the model has {}\..*order"


@pytest.mark.parametrize("kind", KINDS)
def test_an_auxiliary_call_in_training_alone_is_refused_in_inference(kind):
    trained = bound(kind, train=True).calibrate(ROWS)
    assert set(trained.variables["quant"]["shared"]) == {"input", "input2"}
    with pytest.raises(jaxqat.QuantizationError, match=MESSAGE.format(2, 1)):
        trained.bind(train=False)(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_inference_are_refused_in_training_with_one_call_more(kind):
    network = bound(kind, train=False).calibrate(ROWS)
    with pytest.raises(jaxqat.QuantizationError, match=MESSAGE.format(1, 2)):
        network.bind(train=True)(ROWS)


def test_calibration_goes_on_only_with_the_same_calls():
    network = bound("linen", train=True).calibrate(ROWS)
    with pytest.raises(jaxqat.QuantizationError, match=MESSAGE.format(2, 1)):
        network.bind(train=False).calibrate(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_new_ranges_of_inference_are_those_of_its_only_call(kind):
    network = bound(kind, train=False).calibrate(ROWS)
    wide = np.asarray(jnp.tanh(ROWS) * 8)
    found = network.variables["quant"]["shared"]["input"]
    np.testing.assert_array_equal([found["min"], found["max"]], [wide.min(), wide.max()])
    assert np.isfinite(network(ROWS)[0]).all()


class Auxiliary(nn.Module):
    """A classifier that only training has, and a layer called twice in both modes."""

    @nn.compact
    def __call__(self, x, train):
        shared = nn.Dense(12, name="shared")
        y = nn.relu(shared(x))
        aux = nn.Dense(3, name="aux")(jnp.tanh(y)) if train else None
        return nn.Dense(3, name="head")(nn.relu(shared(y))), aux


def test_ranges_of_a_training_head_are_not_used_in_inference():
    variables = linen_variables(Auxiliary(), ROWS, True)
    model = jaxqat.quantize(Auxiliary())
    variables = model.calibrate(variables, ROWS, train=True)
    assert {"aux", "shared", "head"} == set(variables["quant"])
    alone = {name: x for name, x in variables["quant"].items() if name != "aux"}
    expected, _ = model.apply({**variables, "quant": alone}, ROWS, train=False)
    result, _ = model.apply(variables, ROWS, train=False)
    np.testing.assert_array_equal(result, expected)


class Dropping(nn.Module):
    """Three residual additions in inference; training leaves out the first (stochastic depth)."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(12, name="stem")(x)
        for number in range(3):
            if not (train and number == 0):
                x = x + nn.Dense(12, name=f"branch{number}")(nn.relu(nn.LayerNorm()(x)))
        return nn.Dense(3, name="head")(x * 0.5 + 0.1)


def test_sums_that_differ_in_number_between_modes_are_refused():
    variables = linen_variables(Dropping(), ROWS, False)
    model = jaxqat.quantize(Dropping())
    variables = model.calibrate(variables, ROWS, train=False)
    with pytest.raises(
        jaxqat.QuantizationError, match=r"made with 2 quantized tensors 'head/term', and .* has 1"
    ):
        model.apply(variables, ROWS, train=True)


class Aside(nn.Module):
    """In training, another layer reads the shared layer's first input, and it has a second one."""

    @nn.compact
    def __call__(self, x, train):
        shared = nn.Dense(12, name="shared")
        if train:
            nn.Dense(3, name="aside")(x)
        result = shared(x)
        return result + shared(50 * x) if train else result


def test_a_range_is_not_taken_from_another_call_if_a_layer_aside_shares_the_first_input():
    variables = linen_variables(Aside(), ROWS, True)
    model = jaxqat.quantize(Aside())
    variables = model.calibrate(variables, ROWS, train=True)
    assert set(variables["quant"]["shared"]) == {"input2"}
    with pytest.raises(jaxqat.QuantizationError, match=r"No range for 'shared/input'"):
        model.apply(variables, ROWS, train=False)
