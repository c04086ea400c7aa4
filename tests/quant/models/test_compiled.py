"""Calls of quantized models are traced once for each shape, and never with what is out of date."""

import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat
from jaxqat.quant._models import compiled

X = jax.random.normal(jax.random.key(0), (4, 6))
PARAMS = {"w": jax.random.normal(jax.random.key(1), (6, 3))}
# A bias is rounded to the product of both steps: two of them differ by one such unit at most.
BIAS = float(jnp.ptp(X) / 255 * jnp.abs(PARAMS["w"]).max() / 127)


class Counted:
    """A function of (params, x) that counts how often it is traced."""

    def __init__(self):
        self.traced = 0
        self.shift = 0.0

    def __call__(self, params, x, scale=1):
        self.traced += 1
        return x @ params["w"] * (scale if scale is not True else 2) + self.shift


def calibrated(function):
    model = jaxqat.quantize(function, "int8")
    return model, model.calibrate({"params": PARAMS}, X)


def test_a_call_is_traced_once_for_each_shape():
    function = Counted()
    model, variables = calibrated(function)
    before = function.traced
    for _ in range(3):
        model.apply(variables, X)
    assert function.traced == before  # Calibration has traced this shape.
    model.apply(variables, X[:2])
    model.apply(variables, X[:2])
    assert function.traced == before + 1


def test_an_eager_call_gives_the_bits_of_a_jitted_one():
    model, variables = calibrated(Counted())
    np.testing.assert_array_equal(
        model.apply(variables, X), jax.jit(lambda v, x: model.apply(v, x))(variables, X)
    )


def test_a_changed_closure_is_read_as_under_jit():
    function = Counted()
    model, variables = calibrated(function)
    first = model.apply(variables, X)
    jitted = jax.jit(lambda v, x: model.apply(v, x))
    jitted(variables, X)
    function.shift = 100.0
    np.testing.assert_array_equal(model.apply(variables, X), first)
    np.testing.assert_array_equal(jitted(variables, X), first)


def test_static_arguments_of_equal_value_and_other_type_are_told_apart():
    model, variables = calibrated(Counted())
    once = model.apply(variables, X, scale=1)
    twice = model.apply(variables, X, scale=True)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
    np.testing.assert_array_equal(model.apply(variables, X, scale=1), once)


def test_values_of_a_trace_that_a_model_closes_over_are_never_kept():
    closed = {}

    def function(params, x):
        return x @ params["w"] + closed["shift"]

    model = jaxqat.quantize(function, "int8")
    closed["shift"] = jnp.zeros(3)

    @jax.jit
    def shifted(shift, x):
        closed["shift"] = shift
        variables = model.calibrate({"params": PARAMS}, X)
        return model.apply(variables, x)

    zero = shifted(jnp.zeros(3), X)
    more = jax.jit(lambda shift, x: shifted.__wrapped__(shift, x))(jnp.full(3, 5.0), X)
    np.testing.assert_allclose(more, zero + 5, atol=BIAS)
    closed["shift"] = jnp.ones(3)
    np.testing.assert_allclose(
        model.apply(model.calibrate({"params": PARAMS}, X), X), zero + 1, atol=BIAS
    )


def test_the_configuration_of_jax_is_part_of_the_key():
    function = Counted()
    model, variables = calibrated(function)
    before = function.traced
    with jax.default_matmul_precision("highest"):
        model.apply(variables, X)
    assert function.traced == before + 1


def test_unseen_ranges_are_refused_although_the_call_is_compiled():
    model, variables = calibrated(Counted())
    model.apply(variables, X)
    empty = model.init_quant({"params": PARAMS}, X)
    with pytest.raises(jaxqat.JaxqatError, match="has seen no data"):
        model.apply(empty, X)


def test_equal_modules_share_what_is_compiled():
    def planner(module):
        model = jaxqat.quantize(module, "int8")
        bound = model.bind({"params": {"kernel": PARAMS["w"]}})
        return compiled.planner_of(bound.function, bound._call((X,)), bound.recipe)

    assert planner(nn.Dense(3)) is planner(nn.Dense(3))
    assert planner(nn.Dense(3)) is not planner(nn.Dense(3, use_bias=False))


class Shifted(nn.Module):
    """A module with an array as an attribute, which has no hash."""

    shift: jax.Array

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) + self.shift


def test_a_module_that_holds_an_array_is_traced_for_each_call():
    variables = Shifted(jnp.zeros(3)).init(jax.random.key(0), X)
    results = []
    for shift in (0.0, 5.0):
        model = jaxqat.quantize(Shifted(jnp.full(3, shift)), "int8")
        results.append(model.apply(model.calibrate(variables, X), X))
    np.testing.assert_allclose(results[1], results[0] + 5, atol=BIAS)


def test_modes_of_nnx_modules_are_told_apart_and_their_state_moves():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(6, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    model = jaxqat.quantize(Net(nnx.Rngs(0)), "int8")
    model.eval()
    model.calibrate(X)
    frozen = model(X)
    model.train()
    model(X)
    first = np.asarray(model.module.norm.mean.get_value())
    model(X)
    second = np.asarray(model.module.norm.mean.get_value())
    assert np.abs(first).min() > 0
    assert np.abs(second).min() > np.abs(first).min()  # Each step goes on from the last.
    model.eval()
    assert not np.array_equal(model(X), frozen)  # The statistics have moved.


def test_gradients_of_an_eager_step_are_those_of_a_jitted_one():
    model, variables = calibrated(Counted())

    def loss(params):
        result, _ = model.apply({**variables, "params": params}, X, mutable=["quant"])
        return jnp.sum(result**2)

    eager, jitted = jax.grad(loss)(PARAMS)["w"], jax.jit(jax.grad(loss))(PARAMS)["w"]
    # Sums of 4 products: the orders differ by at most 4 roundings.
    np.testing.assert_allclose(eager, jitted, rtol=4 * 2**-23, atol=1e-6)


def test_arrays_of_a_call_are_not_kept():
    model = jaxqat.quantize(lambda params, x: x @ params["w"], "int8")
    weights = jax.random.normal(jax.random.key(5), (6, 3))
    variables = model.calibrate({"params": {"w": weights}}, X)
    model.apply(variables, X)
    alive = weakref.ref(weights)
    del weights, variables
    gc.collect()
    assert alive() is None
