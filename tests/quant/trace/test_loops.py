"""Loops with products inside: iterations in order, with one range or one layer for each."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references.sqnr import decibels

import jaxqat
from jaxqat.export._onnx.model import onnx_model
from jaxqat.export._onnx.runtime import run_onnx
from jaxqat.quant._trace.program import MAX_ITERATIONS

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
SEQUENCES = RNG.normal(size=(4, 5, 6)).astype(np.float32)
ROWS = RNG.normal(size=(8, 6)).astype(np.float32)


def weights(*shape):
    return np.random.default_rng(sum(shape)).normal(0, 0.4, shape).astype(np.float32)


PARAMS = {"in": weights(6, 7), "state": weights(7, 7), "layers": weights(3, 6, 6)}


def recurrent(params, x):
    def iteration(state, row):
        state = jnp.tanh(row @ params["in"] + state @ params["state"])
        return state, state

    return jax.lax.scan(iteration, jnp.zeros((x.shape[0], 7)), jnp.swapaxes(x, 0, 1))


def written_out(params, x):
    state, states = 0 * x[:, 0, :1] + jnp.zeros(7), []  # As a loop's, no constant.
    for t in range(x.shape[1]):
        state = jnp.tanh(x[:, t] @ params["in"] + state @ params["state"])
        states.append(state)
    return state, jnp.stack(states)


def reversed_(params, x):
    def iteration(state, row):
        state = jnp.tanh(row @ params["in"] + state @ params["state"])
        return state, state

    return jax.lax.scan(iteration, jnp.zeros((x.shape[0], 7)), jnp.swapaxes(x, 0, 1), reverse=True)


def stacked(params, x):
    """Layers in a loop over their stacked weights, as `nn.scan` makes them."""
    return jax.lax.scan(lambda x, w: (nn.relu(x @ w), None), x, params["layers"])[0]


@pytest.mark.parametrize("function", [recurrent, reversed_])
def test_without_quantization_an_unrolled_loop_is_the_loop(function):
    rules = (jaxqat.Rule(weight_bits=None, act_bits=None),)
    model = jaxqat.quantize(function, jaxqat.Recipe(rules=rules))
    for found, expected in zip(
        jax.tree.leaves(model.apply({"params": PARAMS}, SEQUENCES)),
        jax.tree.leaves(function(PARAMS, SEQUENCES)),
        strict=True,
    ):
        # 13 products each, |values| <= 1: five iterations of 2**-24 times 13 sums are below 2**-17.
        np.testing.assert_allclose(found, expected, atol=2**-17)


def test_turns_share_one_row_and_one_range_of_each_weight():
    network = jaxqat.calibrate(recurrent, {"params": PARAMS}, batches=[SEQUENCES])
    ranges = network.variables["quant"]
    table = network.layers(SEQUENCES)
    assert [(row.path, row.macs) for row in table] == [
        ("in", 4 * 5 * 6 * 7),
        ("state", 4 * 5 * 7 * 7),
    ]
    assert set(ranges) == {"in", "state"}
    # The widest of all iterations.
    states = np.asarray(written_out(PARAMS, SEQUENCES)[1])[:-1]
    for found, expected in (
        (ranges["in"]["input"]["min"], SEQUENCES.min()),
        (ranges["in"]["input"]["max"], SEQUENCES.max()),
        (ranges["state"]["input"]["min"], min(states.min(), 0)),  # The first iteration has zeros.
        (ranges["state"]["input"]["max"], max(states.max(), 0)),
    ):
        np.testing.assert_allclose(found, expected, atol=2**-17)  # As above.


def test_a_quantized_loop_is_the_quantized_network_written_out_with_the_same_ranges():
    loop = jaxqat.calibrate(recurrent, {"params": PARAMS}, batches=[SEQUENCES])
    ranges = loop.variables["quant"]
    long = jaxqat.quantize(written_out)
    variables = long.init_quant({"params": PARAMS}, SEQUENCES)
    same = variables["quant"]
    for module, tensors in same.items():
        same[module] = {name: ranges[module][name.rstrip("0123456789")] for name in tensors}
    found, expected = loop(SEQUENCES), long.apply(variables, SEQUENCES)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_stacked_in_a_loop_are_layers_of_their_own():
    network = jaxqat.calibrate(stacked, {"params": PARAMS}, batches=[ROWS])
    ranges = network.variables["quant"]
    table = network.layers(ROWS)
    assert [row.path for row in table] == ["0", "1", "2"]
    assert all(row.weight_bits == 8 for row in table)
    x, w = ROWS, PARAMS["layers"]
    for number in range(3):
        held = ranges[str(number)]["input"]
        # Sums of 6 products of magnitudes below 4: 6 * 16 * 2**-24 < 2**-17.
        np.testing.assert_allclose([held["min"], held["max"]], [x.min(), x.max()], atol=2**-15)
        x = np.maximum(x @ w[number], 0)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="head")(block(name="blocks")(x, None)[0])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(6, name="dense")(x)), None


def test_a_scanned_stack_of_linen_layers_becomes_an_integer_network():
    module = Stack()
    variables = module.init(jax.random.key(0), ROWS)
    network = jaxqat.calibrate(module, variables, batches=[ROWS])
    paths = [row.path for row in network.layers(ROWS)]
    assert paths == ["blocks/dense/0", "blocks/dense/1", "blocks/dense/2", "head"]
    graph = jaxqat.convert(network, ROWS[:1])
    check = jaxqat.verify(network, graph=graph, batches=[ROWS])
    assert (check.differing, check.top1_flips) == (0, 0)


def injected(params, x):
    """A recurrent cell to which a tensor from outside of the loop is added in every iteration."""
    h = x @ params["in"]
    cell = lambda c, _: (nn.relu(h + c @ params["state"]), None)  # noqa: E731
    return jax.lax.scan(cell, nn.relu(x @ params["in"]), length=3)[0] @ params["out"]


def injected_and_written_out(params, x):
    h = x @ params["in"]
    c = nn.relu(h)
    for _ in range(3):
        c = nn.relu(h + c @ params["state"])
    return c @ params["out"]


@pytest.mark.parametrize("recipe", ["int8", "int8_symmetric"])
def test_a_loop_with_shared_weights_and_sums_becomes_an_integer_network(recipe):
    params = {"params": {**PARAMS, "out": weights(7, 3)}}
    rows = RNG.normal(size=(256, 6)).astype(np.float32)
    network, long = (
        jaxqat.calibrate(f, params, batches=[rows], recipe=recipe)
        for f in (injected, injected_and_written_out)
    )
    # Iterations share the ranges of the layer's input and of its result, a term of a sum.
    assert {"/".join(key) for key in network.state} == {
        *("in/input", "in/output", "state/input", "state/output", "out/input")
    }
    graph = jaxqat.convert(network, rows)
    check = jaxqat.verify(network, graph=graph, batches=[rows])
    assert not check.failures and (check.differing, check.differing_results) == (0, 0)
    # All three iterations are compared.
    assert {f"state/{name}" for name in ("input", "input[1]", "input[2]", "output[2]")} < {
        tensor.name for tensor in check.tensors
    }
    found, codes = run_onnx(onnx_model(graph).SerializeToString(), rows, expose=True)
    np.testing.assert_array_equal(found, network(rows))
    for name, wanted in jaxqat.make_executor(graph).codes(rows).items():
        np.testing.assert_array_equal(codes[name], wanted, err_msg=name)
    expected = injected(params["params"], rows)
    quality, written = (decibels(expected, n(rows)) for n in (network, long))
    # Written out, each iteration has ranges of its own. A shared range is the widest of them, which
    # is the last iteration's here, so the first two are coarser: 0.1 and 0.7 dB were measured, at
    # 35.3 and 36.4 dB.
    assert quality > 33 and quality > written - 2


def test_a_loop_of_too_many_turns_stays_in_float_and_is_named():
    def function(params, x):
        iteration = lambda c, _: (jnp.tanh(c @ params["state"]), None)  # noqa: E731
        return jax.lax.scan(iteration, x @ params["in"], length=MAX_ITERATIONS + 1)[0]

    network = jaxqat.calibrate(function, {"params": PARAMS}, batches=[ROWS])
    table = network.layers(ROWS)
    assert [row.weight_bits for row in table] == [8, None]
    assert "inside a 'scan'" in (table[1].float_reason or "")
    assert np.isfinite(network(ROWS)).all()


def test_every_weight_of_a_loop_gets_a_gradient():
    network = jaxqat.calibrate(recurrent, {"params": PARAMS}, batches=[SEQUENCES])
    gradients = jax.grad(lambda p: jnp.sum(network.with_variables(params=p)(SEQUENCES)[0] ** 2))(
        PARAMS
    )
    exact = jax.grad(lambda p: jnp.sum(recurrent(p, SEQUENCES)[0] ** 2))(PARAMS)
    for name in ("in", "state"):
        cosine = np.vdot(gradients[name], exact[name]) / (
            np.linalg.norm(gradients[name]) * np.linalg.norm(exact[name])
        )
        assert cosine > 0.99  # Of 8 bits: the directions agree.


def test_all_turns_of_a_first_layer_have_the_bits_of_the_first_layer():
    recipe = jaxqat.Recipe(weight_bits=4, act_bits=4, first_last_bits=8, weight_range="lsq")

    def function(params, x):
        state = jax.lax.scan(
            lambda h, _: (jnp.tanh(h @ params["state"]), None), x[:, 0, :1] * jnp.ones(7), length=3
        )[0]
        return jnp.tanh(state @ params["state"]) @ params["in"].T

    network = jaxqat.calibrate(function, {"params": PARAMS}, batches=[SEQUENCES], recipe=recipe)
    record = network.record(SEQUENCES)
    layers: list[Any] = [layer for layer in record.plan.layers.values() if layer.path == "state"]
    assert [layer.quantizer.bits for layer in layers] == [8, 8, 8, 4]


def test_a_loop_without_turns_gives_what_it_is_given():
    def empty(params, x):
        return jax.lax.scan(
            lambda c, row: (c @ params["state"], c), x @ params["in"], jnp.zeros((0,))
        )

    network = jaxqat.calibrate(empty, {"params": PARAMS}, batches=[ROWS])
    carried, stacked = network(ROWS)
    assert carried.shape == (8, 7) and stacked.shape == (0, 8, 7)


def test_a_reason_is_told_once_for_all_iterations():
    def running(params, x):
        def iteration(state, row):
            state = jnp.cumsum(row @ params["in"] + state @ params["state"], -1)
            return state, state

        return jax.lax.scan(iteration, jnp.zeros((x.shape[0], 7)), jnp.swapaxes(x, 0, 1))

    network = jaxqat.calibrate(running, {"params": PARAMS}, batches=[SEQUENCES])
    with pytest.raises(jaxqat.ConversionError) as error:
        jaxqat.convert(network, SEQUENCES, strict=True)
    told = [r for r in error.value.reasons if r.startswith("state/input: 'cumsum'")]
    assert len(told) == 1 and not any("[" in reason.split(":")[0] for reason in error.value.reasons)
