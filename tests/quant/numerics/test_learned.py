"""Learned step sizes and bounds: their gradients against the formulas, and what learning brings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat
from jaxqat import Recipe
from jaxqat.quant._numerics import activations, grids, weights
from jaxqat.quant.recipe import Settings

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(64, 12)).astype(np.float32)
PARAMS = {
    "first": RNG.normal(0, 0.4, (12, 16)).astype(np.float32),
    "second": RNG.normal(0, 0.4, (16, 4)).astype(np.float32),
}


def function(params, x):
    return jnp.maximum(x @ params["first"], 0) @ params["second"]


def learning(bits=4, **changes):
    values = {"weight_range": "lsq", "act_range": "lsq", **changes}
    recipe = Recipe(weight_bits=bits, act_bits=bits, **values)
    return jaxqat.calibrate(function, {"params": PARAMS}, batches=[ROWS], recipe=recipe)


def slope(u, low, high, zero, learned):
    """D x^ / d s of one value, u = x / s (Esser et al. 2020, equation 3; Choi et al. 2018)."""
    code = np.round(u) + zero
    clipped = np.clip(code, low, high) - zero
    inside = (code >= low) & (code <= high)
    return np.where(inside, (clipped - u) if learned == "lsq" else 0.0, clipped)


@pytest.mark.parametrize("learned", ["lsq", "pact"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_of_a_step_size_is_the_formula_of_its_paper(learned, symmetric):
    x = jnp.asarray(RNG.normal(0, 2, size=(8, 10)), jnp.float32)
    g = RNG.normal(size=x.shape).astype(np.float32)
    base = grids.grid(jnp.float32(-1), jnp.float32(3), bits=4, symmetric=symmetric)

    def loss(scale):
        grid = grids.with_scale(base, scale)
        values, _ = activations.quantize(x, activations.in_units(x, grid), grid, learned=learned)
        return jnp.sum(values * g)

    s = 0.25
    zero = int(base.zero)
    expected = np.sum(g * slope(np.asarray(x, np.float64) / s, base.low, base.high, zero, learned))
    if learned == "lsq":  # 10 values an example.
        expected /= np.sqrt(10 * (base.high - zero))
    # 80 terms of magnitudes below 64, summed in float32.
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(s)), expected, atol=80 * 64 * 2**-23)


def test_the_gradient_of_weight_steps_is_the_formula_in_each_channel():
    w = RNG.normal(size=(12, 5)).astype(np.float32)
    step = np.full((1, 5), 0.2, np.float32)
    g = RNG.normal(size=w.shape).astype(np.float32)
    quantizer = weights.WeightQuantizer(
        Settings(weight_bits=4, weight_range="lsq"), (0,), jnp.float32
    )

    def loss(w, step):
        values: Any = weights.dequantized_weights(quantizer, w, step)
        return jnp.sum(values * g)

    of_weights, of_step = jax.grad(loss, argnums=(0, 1))(w, step)
    u = w.astype(np.float64) / step
    kept = np.abs(np.round(u)) <= 7
    assert not kept.all()
    np.testing.assert_array_equal(of_weights, np.where(kept, g, 0))
    expected = (g * slope(u, -7, 7, 0, "lsq")).sum(0, keepdims=True) / np.sqrt(12 * 7)
    np.testing.assert_allclose(of_step, expected, atol=12 * 16 * 2**-23)  # 12 terms below 16.


def test_learning_starts_from_the_step_size_of_the_paper():
    learned = learning(bits=3).variables["quant_params"]
    step = learned["first"]["weights"]["step"]
    expected = 2 * np.abs(PARAMS["first"]).mean(0, keepdims=True) / np.sqrt(3)
    np.testing.assert_allclose(step, expected, rtol=2**-18)  # Means of 12 float32.
    zero = -4 - np.round(ROWS.min() / ((ROWS.max() - ROWS.min()) / 7))
    expected = 2 * np.abs(ROWS).mean() / np.sqrt(max(3 - zero, zero + 4))
    np.testing.assert_allclose(learned["first"]["input"]["step"], expected, rtol=2**-14)


def test_a_learned_bound_starts_at_the_largest_value_of_calibration():
    learned = learning(act_range="pact", weight_range="absmax").variables["quant_params"]
    hidden = np.maximum(ROWS @ PARAMS["first"], 0)
    np.testing.assert_allclose(learned["second"]["input"]["bound"], hidden.max(), rtol=2**-18)


def trained(network, steps=60):
    """Fits the float function's outputs by step sizes alone, the weights held."""
    target = function(PARAMS, ROWS)
    learned = network.variables["quant_params"]

    @jax.jit
    def update(learned):
        def loss(learned):
            out = network.with_variables(quant_params=learned)(ROWS)
            return jnp.mean((out - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(learned)
        return jax.tree.map(lambda p, g: p - 0.02 * g, learned, gradient), value

    losses = []
    for _ in range(steps):
        learned, value = update(learned)
        losses.append(float(value))
    return network.with_variables(quant_params=learned), losses


@pytest.mark.parametrize("act_range", ["lsq", "pact"])
def test_training_step_sizes_alone_lowers_the_error_and_converts_exactly(act_range):
    network = learning(bits=3, act_range=act_range)
    if act_range == "pact":  # It learns from values that are clipped.
        for module in network.variables["quant_params"].values():
            module["input"]["bound"] *= 0.3
    network, losses = trained(network)
    assert np.mean(losses[-10:]) < 0.9 * losses[0]
    graph = jaxqat.convert(network, ROWS[:1])
    check = jaxqat.verify(network, graph=graph, batches=[ROWS])
    assert (check.differing, check.top1_flips) == (0, 0)


def test_what_is_learned_is_a_collection_of_its_own():
    network = learning()
    learned, rest = network.variables["quant_params"], network.variables["quant"]
    assert all(path[-1].key == "step" for path, _ in jax.tree_util.tree_leaves_with_path(learned))
    assert len(jax.tree.leaves(learned)) == 4  # Two tensors, two kernels.
    assert all(path[-1].key != "step" for path, _ in jax.tree_util.tree_leaves_with_path(rest))
    joined = network.with_state(network.state).variables
    assert jax.tree.structure(joined) == jax.tree.structure(network.variables)
    jax.tree.map(np.testing.assert_array_equal, joined, network.variables)
    plain = jaxqat.calibrate(function, {"params": PARAMS}, batches=[ROWS])
    assert set(plain.variables) == {"params", "quant"}


def test_a_training_step_leaves_learned_ranges_to_the_gradient():
    network = learning()
    model: Any = network.model
    mutable = ["quant", "quant_params"]
    _, after = model.apply(network.variables, 3 * ROWS, mutable=mutable)
    assert set(after) == set(mutable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        before = network.variables
        for key in path:
            before = before[key.key]
        if path[-1].key != "count":
            np.testing.assert_array_equal(leaf, before)


def test_a_network_that_never_saw_data_starts_to_learn_in_its_first_step():
    recipe = Recipe(weight_bits=4, act_bits=4, weight_range="lsq", act_range="lsq")
    model = jaxqat.quantize(function, recipe)
    empty = model.init_quant({"params": PARAMS}, ROWS)
    _, after = model.apply(empty, ROWS, mutable=["quant", "quant_params"])
    calibrated = model.calibrate(empty, ROWS)
    learned, expected = (s["quant_params"] for s in (after, calibrated))
    first = lambda tree: jax.tree.leaves(tree["first"])  # noqa: E731
    for a, b in zip(first(learned), first(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_zero_weights_and_zero_activations_stay_zero():
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    recipe = Recipe(weight_bits=2, act_bits=2, weight_range="lsq", act_range="lsq")
    network = jaxqat.calibrate(function, {"params": zeros}, batches=[0 * ROWS], recipe=recipe)
    np.testing.assert_array_equal(network(0 * ROWS), 0)


@pytest.mark.parametrize("act_range", ["lsq", "pact"])
def test_the_described_range_is_what_the_learned_scale_covers(act_range):
    network = learning(act_range=act_range, weight_range="absmax")
    described = jaxqat.describe(network, ROWS)
    grids = {key[0]: codes.grid for key, codes in network.record(ROWS).codes.items()}
    for layer in described.layers:
        grid = grids[layer.layer.path]
        expected = [float(grid.scale * (code - grid.zero)) for code in (grid.low, grid.high)]
        assert layer.input_range == pytest.approx(expected, rel=2**-22)
        assert "{:.3g} .. {:.3g}".format(*layer.input_range or ()) in str(described)


@pytest.mark.parametrize("act_range", ["lsq", "pact"])
def test_a_tensor_that_is_never_positive_has_a_grid_as_fine_as_its_mirror_image(act_range):
    """All codes stand below zero there, and step sizes divide by a number of codes."""
    weights, rows = PARAMS["first"], np.abs(ROWS)
    recipe = Recipe(weight_bits=4, act_bits=4, act_range=act_range)
    found = []
    for sign in (1, -1):
        x = sign * rows
        product = lambda w, x: x @ w  # noqa: E731
        network = jaxqat.calibrate(product, {"params": weights}, batches=[x], recipe=recipe)
        found.append(network(x))
    # Codes are rounded to even on a grid and its mirror image alike.
    np.testing.assert_array_equal(found[0], -found[1])


def test_parts_of_one_parameter_and_its_transpose_learn_steps_of_their_own():
    w = np.concatenate([np.ones((12, 4)), 100 * np.ones((12, 4))], 1).astype(np.float32)
    w *= RNG.normal(size=w.shape).astype(np.float32)

    def halves(w, x):
        left, right = jnp.split(w, 2, axis=1)
        return jnp.concatenate([x @ left, x @ right], 1)

    recipe = Recipe(weight_range="lsq")
    network = jaxqat.calibrate(halves, {"params": w}, batches=[ROWS], recipe=recipe)
    steps = [leaf for leaf in jax.tree.leaves(network.variables["quant_params"])]
    expected = 2 * np.abs(w).mean(0, keepdims=True) / np.sqrt(127)
    np.testing.assert_allclose(np.concatenate(steps, 1), expected, rtol=2**-18)

    def tied(w, x):
        return (x @ w) @ w.T

    network = jaxqat.calibrate(tied, {"params": w}, batches=[ROWS], recipe=recipe)
    assert len(jax.tree.leaves(network.variables["quant_params"])) == 2
    assert np.isfinite(network(ROWS)).all()


def test_a_parameter_that_two_layers_share_learns_one_step():
    w = RNG.normal(0, 0.3, (12, 12)).astype(np.float32)
    recipe = Recipe(weight_range="lsq")
    function = lambda w, x: jnp.tanh(x @ w) @ w  # noqa: E731
    network = jaxqat.calibrate(function, {"params": w}, batches=[ROWS], recipe=recipe)
    assert len(jax.tree.leaves(network.variables["quant_params"])) == 1
