"""Residual additions: each term has a grid of its own, and the sum is rounded once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references.integers import affine_grid, weight_codes
from references.sqnr import decibels

import jaxqat
from jaxqat.export._onnx.model import onnx_model
from jaxqat.export._onnx.runtime import run_onnx
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow

RECIPES = ("int8", "int8_symmetric")
SHARES = (0.5, 0.67, 0.8, 0.9)


def sum_network(params, x):
    return (x + x @ params["a"]["kernel"]) @ params["w"]["kernel"]


@functools.cache
def cell(recipe, share, mixed):
    """A calibrated x + A x, where A takes a share of x away (and mixes its channels)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 16)).astype(np.float32)
    taken = -share * np.eye(16) + mixed * rng.normal(size=(16, 16)) / 16
    params = {
        "a": {"kernel": taken.astype(np.float32)},
        "w": {"kernel": rng.normal(size=(16, 4)).astype(np.float32)},
    }
    network = jaxqat.calibrate(sum_network, {"params": params}, batches=[x], recipe=recipe)
    return network, sum_network(params, x), x


def rounded(x, symmetric):
    """A tensor on the 8-bit grid of its own range, in float64."""
    if symmetric:
        scale = np.abs(x).max() / 127
        return np.clip(np.round(x / scale), -127, 127) * scale
    scale, zero = affine_grid(x.min(), x.max())
    return (np.clip(np.round(x / scale) + zero, -128, 127) - zero) * np.float64(scale)


def separately_rounded(params, x, symmetric):
    """The network with each tensor on a grid of its own and the sum in real numbers."""
    weights = [np.multiply(*weight_codes(params[name]["kernel"])) for name in "aw"]
    x = rounded(x, symmetric)
    total = x + rounded(x @ weights[0], symmetric)
    return rounded(total, symmetric) @ weights[1]


@pytest.mark.parametrize("mixed", [0, 1], ids=["scaled", "mixed"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sum_of_opposite_terms_keeps_their_precision(recipe, share, mixed):
    network, real, x = cell(recipe, share, mixed)
    found = decibels(real, network(x))
    params = network.variables["params"]
    # Dyadic multipliers have 13 bits or more, the codes 8. The mean of 2,048 squared errors has a
    # relative deviation of sqrt(2 / 2,048), 0.14 dB; 0.6 dB are three of the difference of two.
    assert found >= decibels(real, separately_rounded(params, x, "symmetric" in recipe)) - 0.6
    if not mixed:  # Nothing cancels but what each term is, so 8 bits give their usual 40 dB.
        assert found >= 38


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_its_codes_are_those_of_the_integer_network_and_of_onnx_runtime(recipe, share):
    network, _, x = cell(recipe, share, 1)
    graph = jaxqat.convert(network, x)
    verification = jaxqat.verify(network, graph=graph, batches=[x])
    assert (verification.differing, verification.codes) == (0, 3 * x.size)
    _, codes = run_onnx(onnx_model(graph).SerializeToString(), x, expose=True)
    for name, expected in jaxqat.make_executor(graph).codes(x).items():
        np.testing.assert_array_equal(codes[name], expected, err_msg=name)


def test_no_gradient_flows_through_a_clipped_term():
    """Behind a range that was observed on smaller values, a large term is clipped."""
    ones = np.ones((2, 1), np.float32)
    params: Any = {"a": {"kernel": np.eye(2, dtype=np.float32)}, "w": {"kernel": ones}}
    small = np.random.default_rng(0).uniform(-1, 1, (64, 2)).astype(np.float32)
    network = jaxqat.calibrate(sum_network, {"params": params}, batches=[small], recipe="int8")
    inside = np.array([[0.5, -0.5]], np.float32)
    grown = {**params, "a": {"kernel": 4 * params["a"]["kernel"]}}
    gradient = jax.grad(lambda p: network.with_variables(params=p)(inside).sum())
    assert (np.diag(np.asarray(gradient(params)["a"]["kernel"])) != 0).all()
    # 4 * 0.5 is beyond the term's range of 1, though the sum's range of 2 would hold some of it.
    assert (np.asarray(gradient(grown)["a"]["kernel"]) == 0).all()


def relu_network(params, x):
    y = jax.nn.relu(x @ params["a"]["kernel"])
    return jax.nn.relu(y + y @ params["b"]["kernel"]) @ params["w"]["kernel"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_grid_of_a_term_leaves_out_what_a_relu_discards(recipe):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype(np.float32)
    params = {n: {"kernel": rng.normal(size=(8, 8)).astype(np.float32)} for n in "abw"}
    params["b"]["kernel"] -= 0.7  # Most sums are negative, and discarded.
    network = jaxqat.calibrate(relu_network, {"params": params}, batches=[x], recipe=recipe)
    observed = network.state["b", "output"]
    codes = network.model.record(network.variables, x).codes
    other = codes["b", "input"].grid
    term = codes["b", "output"].grid
    lowest = float(term.scale * (term.low - term.zero))
    needed = -float(other.scale * (other.high - other.zero))
    assert float(observed["min"]) < 2 * needed
    if recipe == "int8":
        # The range moves by half a code at most, for the zero point to be an integer.
        assert abs(lowest - needed) <= 0.5 * float(term.scale)
    else:
        # The symmetric grid covers the larger side.
        span = max(-needed, float(observed["max"]))
        np.testing.assert_allclose(float(term.scale), span / 127, rtol=4 * 2**-24)
    # Nothing is lost by it: every sum that is not discarded is as near as both roundings allow.
    real = relu_network(params, x)
    assert decibels(real, network(x)) > 30


def test_a_term_that_is_always_zero_takes_the_grid_of_the_sum():
    """Else its scale of 1 would leave the other term few bits (a batch norm with gamma 0)."""
    rng = np.random.default_rng(0)
    x = (0.01 * rng.normal(size=(256, 8))).astype(np.float32)
    params = {n: {"kernel": rng.normal(size=(8, 8)).astype(np.float32)} for n in "aw"}
    params["a"]["kernel"] *= 0
    network = jaxqat.calibrate(sum_network, {"params": params}, batches=[x], recipe="int8")
    codes = network.model.record(network.variables, x).codes
    total, term = (codes[key].grid for key in (("w", "input"), ("a", "output")))
    np.testing.assert_allclose(float(term.scale), float(total.scale), rtol=2**-6)
    assert decibels(sum_network(params, x), network(x)) > 38


def tensors_of(function, params, x, recipe: Any = "int8"):
    network = jaxqat.calibrate(function, {"params": params}, batches=[x], recipe=recipe)
    return network, ["/".join(key) for key in network.checked_plan((x,)).empty_state()]


def kernels(*names):
    rng = np.random.default_rng(0)
    return {n: {"kernel": rng.normal(size=(8, 8)).astype(np.float32)} for n in names}


X = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)


def nested(p, x):
    y = x @ p["a"]["kernel"] + x + jax.nn.relu(x @ p["b"]["kernel"])
    return y @ p["w"]["kernel"]


def joined(p, x):
    y = x @ p["a"]["kernel"] + x
    return jnp.concatenate([y, x @ p["b"]["kernel"]], 1) @ jnp.tile(p["w"]["kernel"], (2, 1))


def moved(p, x):
    y = (x @ p["a"]["kernel"]).reshape(-1, 4, 2) + x.reshape(-1, 4, 2)
    return jax.nn.relu(y.transpose(0, 2, 1)).reshape(-1, 8) @ p["w"]["kernel"]


def nested_and_moved(p, x):
    y = (x @ p["a"]["kernel"] + x).reshape(-1, 2, 4).transpose(0, 2, 1)
    y = y + (x @ p["b"]["kernel"]).reshape(-1, 4, 2)
    return jax.nn.relu(y).reshape(-1, 8) @ p["w"]["kernel"]


def shared(p, x):
    y = x @ p["a"]["kernel"]
    return (jax.nn.relu(y + x) @ p["b"]["kernel"] + y) @ p["w"]["kernel"]


def scaled(p, x):
    y = x @ p["a"]["kernel"]
    hidden = jax.nn.relu(y * jnp.linspace(0.5, 1.5, 8) + 0.1)  # It needs accumulators, not codes.
    return jax.nn.relu(y + hidden @ p["b"]["kernel"]) @ p["w"]["kernel"]


def twice(p, x):
    y = x @ p["a"]["kernel"]
    return jax.nn.relu(y + y) @ p["w"]["kernel"]


SUMS = {
    nested: {"a/input", "a/output", "b/output", "w/term", "w/input"},
    joined: {"a/input", "a/output", "w/input"},
    moved: {"a/input", "a/output", "w/input"},
    scaled: {"a/input", "a/output", "b/input", "b/output", "w/input"},
    nested_and_moved: {"a/input", "a/output", "b/output", "w/term", "w/input"},
    twice: {"a/input", "a/output", "w/input"},
    shared: {"a/input", "a/output", "b/input", "b/output", "w/input"},
}


@pytest.mark.parametrize("function", SUMS)
def test_every_term_of_a_sum_is_quantized_and_exact(function):
    network, found = tensors_of(function, kernels("a", "b", "w"), X)
    assert set(found) == SUMS[function]
    graph = jaxqat.convert(network, X)
    assert jaxqat.verify(network, graph=graph, batches=[X]).differing == 0
    assert decibels(function(network.variables["params"], X), network(X)) > 34


def test_a_term_that_something_else_reads_keeps_its_whole_range():
    network, _ = tensors_of(shared, kernels("a", "b", "w"), X)
    grid = network.model.record(network.variables, X).codes["a", "output"].grid
    state = network.state["a", "output"]
    span = float(state["max"]) - float(state["min"])
    np.testing.assert_allclose(float(grid.scale), span / 255, rtol=4 * 2**-24)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_term_of_two_sums_in_one_tensor_is_cut_to_neither(recipe, flipped):
    """relu(h + a) needs h from -1 upwards, relu(h + b) needs all of it."""
    rng = np.random.default_rng(0)
    turned = 30 * np.linalg.qr(rng.normal(size=(8, 8)))[0]
    kernels = {"h": turned, "b": -0.9 * turned, "a": rng.normal(0, 0.1, (8, 8))}
    kernels["w"] = rng.normal(size=(16, 5))
    params = {name: {"kernel": k.astype(np.float32)} for name, k in kernels.items()}
    x = rng.normal(size=(256, 8)).astype(np.float32)

    def function(params, x):
        h, a, b = (x @ params[name]["kernel"] for name in "hab")
        sums = [jax.nn.relu(h + a), jax.nn.relu(h + b)]
        return jnp.concatenate(sums[::-1] if flipped else sums, -1) @ params["w"]["kernel"]

    network = jaxqat.calibrate(function, {"params": params}, batches=[x], recipe=recipe)
    graph = jaxqat.convert(network, x[:1])
    assert jaxqat.verify(network, graph=graph, batches=[x]).differing == 0
    h = x @ params["h"]["kernel"]
    term = graph.tensors["h/output"]
    covered = (np.array([term.low, term.high]) - term.zero_point) * float(term.scale)
    # Zero lies on the grid, so each end can be half a step off; a symmetric one covers more.
    assert covered[0] < h.min() + term.scale and covered[1] > h.max() - term.scale
    # With the range of h cut to the first sum, 2 dB were left. Seven tensors are rounded: each of
    # them alone leaves at least 40 dB here.
    assert decibels(function(params, x), network(x)) > 40 - 10 * np.log10(7)


def test_a_sum_of_layers_in_float_is_not_quantized():
    recipe = jaxqat.Recipe(rules=(jaxqat.Rule(path="a|b", weight_bits=None, act_bits=None),))
    _, found = tensors_of(relu_sum_of_two, kernels("a", "b", "w"), X, recipe)
    assert found == ["w/input"]


def relu_sum_of_two(p, x):
    y = jnp.tanh(x @ p["a"]["kernel"]) + x @ p["b"]["kernel"]
    return jax.nn.relu(y) @ p["w"]["kernel"]


@pytest.mark.parametrize("recipe", ["int4", "lsq4", "pact4"])
def test_terms_have_eight_bits_whatever_the_recipe(recipe):
    recipe = {
        "int4": jaxqat.Recipe(weight_bits=4, act_bits=4, first_last_bits=None),
        "lsq4": jaxqat.Recipe(
            weight_bits=4, act_bits=4, act_range="lsq", weight_range="lsq", first_last_bits=None
        ),
        "pact4": jaxqat.Recipe(weight_bits=4, act_bits=4, act_range="pact", first_last_bits=None),
    }[recipe]
    network, _ = tensors_of(sum_network, kernels("a", "w"), X, recipe)
    codes = network.model.record(network.variables, X).codes
    assert len(np.unique(np.asarray(codes["w", "input"].codes))) <= 16
    assert len(np.unique(np.asarray(codes["a", "output"].codes))) > 64
    assert set(network.state["a", "output"]) == {"min", "max", "count"}


def test_analyze_has_a_row_for_each_term():
    network, _ = tensors_of(nested, kernels("a", "b", "w"), X)
    found = jaxqat.analyze(network, batches=[X])
    assert SUMS[nested] == {tensor.name for tensor in found.tensors}
    # In 8 bits of a bell-shaped range each tensor has some 40 dB.
    assert all(tensor.sqnr_db is not None and tensor.sqnr_db > 34 for tensor in found.tensors)


@pytest.mark.parametrize("shape", [(1, 6, 16), (6, 16)])
def test_an_added_parameter_is_no_term_and_is_not_quantized(shape):
    """As position embeddings: its codes would only add noise. What it is added to is codes."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (12, 16), "positions": shape, "middle": (16, 16), "head": (16, 5)}
    params = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    tokens = rng.normal(size=(64, 6, 12)).astype(np.float32)

    def network(params, x):
        x = x @ params["stem"] + params["positions"]
        return jax.nn.relu(x @ params["middle"]).mean(1) @ params["head"]

    bound = jaxqat.calibrate(network, {"params": params}, batches=[tokens])
    assert {"/".join(key) for key in bound.state} == {
        "stem/input", "middle/argument", "middle/input", "head/pool", "head/input",
    }  # fmt: skip


def test_a_relu_with_its_zero_cast_inside_keeps_the_sum_an_integer_one():
    """As `jax.nn.relu` is inside `jax.shard_map`, from JAX 0.12 on."""
    zero = jax.jit(jnp.copy)

    @jax.custom_jvp
    def relu(x):
        return jnp.maximum(x, jax.lax.convert_element_type(zero(np.int32(0)), x.dtype))

    relu.defjvp(lambda x, t: (relu(*x), jnp.where(x[0] > 0, t[0], 0)))

    def network(params, x):
        return relu(x + x @ params["branch"]) @ params["head"]

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(32, 8)).astype(np.float32)
    params = {"branch": rng.normal(size=(8, 8)), "head": rng.normal(size=(8, 3))}
    params = jax.tree.map(np.float32, params)
    bound = jaxqat.calibrate(network, {"params": params}, batches=[rows])
    assert {"/".join(key) for key in bound.state} == {
        "branch/input", "branch/output", "head/input",
    }  # fmt: skip
    graph = jaxqat.convert(bound, rows)
    assert sum(isinstance(node, g.Add) for node in graph.nodes) == 1
    assert jaxqat.verify(bound, graph=graph, batches=[rows]).differing == 0
