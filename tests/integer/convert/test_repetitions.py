"""Repeated, picked and largest elements are moves of codes, and so are inputs joined or cut."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer.everywhere import result_everywhere
from jax import lax
from plain import others_long
from references import sqnr

import jaxqat
from jaxqat.errors import ConversionError
from jaxqat.integer import graph as g
from jaxqat.integer._convert.geometry import move_steps
from jaxqat.quant import _forms as forms

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 6, 4, 3)).astype(np.float32)
PARAMS = {
    "first": RNG.normal(size=(3, 3, 3, 5)).astype(np.float32) / 3,
    "second": RNG.normal(size=(3, 3, 5, 4)).astype(np.float32) / 3,
    "head": RNG.normal(size=(4, 3)).astype(np.float32),
    "turn": np.float32(-2),
    "dense": RNG.normal(size=(5, 3)).astype(np.float32),
}


def conv(x, weights):
    return lax.conv_general_dilated(
        x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def between(change):
    """A convolution, ReLU, what is tested, another convolution, an average and a head."""

    def network(params, x):
        y = change(jax.nn.relu(conv(x, params["first"])))
        return conv(y, params["second"]).mean((1, 2)) @ params["head"]

    return network


def nearest(rows, columns):
    return lambda y: jax.image.resize(y, (len(y), rows, columns, 5), "nearest")


def by_broadcasting(y):
    y = jnp.broadcast_to(y[:, :, None, :, None], (len(y), 6, 2, 4, 3, 5))
    return y.reshape(len(y), 12, 12, 5)


# Name: the change, and how many of which nodes it takes.
CHANGES = {
    "repeat": (lambda y: jnp.repeat(jnp.repeat(y, 2, 1), 3, 2), {"take": 2}),
    "twice as large": (nearest(12, 8), {"take": 2}),
    "another size": (nearest(9, 3), {"take": 2}),
    "tile": (lambda y: jnp.tile(y, (1, 2, 3, 1)), {"take": 2}),
    "channels": (lambda y: jnp.repeat(y[..., ::2], 2, 3)[..., :5], {"take": 1, "slice": 2}),
    "broadcast": (by_broadcasting, {"reshape": 2, "take": 2}),
    "picked": (lambda y: y[:, np.array([0, 2, -1, 2])], {"take": 1}),
    "taken": (lambda y: jnp.take(y, np.array([3, 1, 1]), axis=2), {"take": 1}),
    "flipped by indices": (lambda y: y[:, :, np.arange(4)[::-1]], {"take": 1}),
    "a skip": (lambda y: y + jnp.repeat(y[:, ::2], 2, 1), {"take": 1, "slice": 1}),
    "rolled": (lambda y: jnp.roll(y, 1, 2), {"slice": 2}),
    "a gate of maxima": (lambda y: y * y.max((1, 2), keepdims=True), {"reshape": 2}),
}
# Whole networks, with their numbers of products.
NETWORKS = {
    **{name: (between(change), moves, 3) for name, (change, moves) in CHANGES.items()},
    "global maximum": (
        lambda p, x: jax.nn.relu(conv(x, p["first"])).max((1, 2)) @ p["dense"], {"reshape": 1}, 2,
    ),
    "an input joined": (
        lambda p, x: between(lambda y: y)(p, jnp.concatenate([x, x[:, ::-1]], 2)),
        {"reverse": 1}, 3,
    ),
    "an input cut": (lambda p, x: between(lambda y: y)(p, x[:, 1:]), {"slice": 1}, 3),
    "an input padded": (
        lambda p, x: between(lambda y: y)(p, jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)))),
        {"pad": 1}, 3,
    ),
    "an input clipped": (
        lambda p, x: between(lambda y: y)(p, jnp.minimum(jax.nn.relu(x), 1)), {}, 3,
    ),
}  # fmt: skip


PLAIN = {"repeat", "another size", "picked", "rolled", "a gate of maxima", "an input joined"}


@pytest.mark.parametrize("name", others_long(NETWORKS, PLAIN))
def test_the_network_moves_codes_and_computes_each_product_once(name, tmp_path):
    function, moves, products = NETWORKS[name]
    model = jaxqat.calibrate(jaxqat.quantize(function), {"params": PARAMS}, batches=[X])
    graph = jaxqat.load(
        jaxqat.save(jaxqat.convert(model, X[:2], strict=True), tmp_path / "network")
    )
    assert not graph.islands
    assert Counter(n.kind for n in graph.nodes if isinstance(n, g.Move)) == moves
    assert len(list(graph.products())) == products
    result = result_everywhere(model, graph, X, tmp_path / "network.onnx")
    # Three quantized tensors of 8 bits.
    assert sqnr.decibels(function(PARAMS, X), result) > 25


def test_a_broadcast_that_changes_nothing_is_one_move():
    operation = forms.Operation("broadcast_in_dim", {"broadcast_dimensions": (0, 1)}, lambda x: x)
    (step,) = move_steps(operation, (2, 3), (2, 3), "x")
    assert (step.kind, step.fields["kind"], step.shape) == (g.Move, "reshape", (3,))


# By the reason.
OTHERS = {
    "picks elements of the batch": lambda y: y[np.array([1, 0])],
    "'argmax' before it": lambda y: jnp.take(y, jnp.argmax(y[0, 0, 0]) + jnp.arange(3), axis=1),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_other_indices_have_no_integer_form(reason):
    model = jaxqat.calibrate(
        jaxqat.quantize(between(OTHERS[reason])), {"params": PARAMS}, batches=[X[:2]]
    )
    with pytest.raises(ConversionError, match=reason):
        jaxqat.convert(model, X[:2], strict=True)


@pytest.mark.parametrize(
    ("axis", "indices"), [(0, (0,)), (4, (0,)), (2, ()), (2, (0, 4)), (2, (-1,))]
)
def test_a_move_takes_only_elements_that_exist(axis, indices):
    move = g.Move(name="m", inputs=("x",), output="y", kind="take", axis=axis, indices=indices)
    tensor = g.Tensor(name="x", shape=X.shape[1:], scale=np.float32(1), zero_point=0)
    with pytest.raises(g.GraphError, match="node 'm': take of"):
        move.check([tensor], tensor)


@pytest.mark.parametrize("pool", ["all", "windows"])
@pytest.mark.parametrize("factor", [lambda p, y: y * -0.5, lambda p, y: y / p["turn"]])
def test_a_negative_factor_behind_a_maximum_makes_no_minimum_of_it(pool, factor):
    def function(params, x):
        y = conv(x, params["first"])
        y = y.max((1, 2)) if pool == "all" else nn.max_pool(y, (2, 2), (2, 2))
        return factor(params, y).reshape(len(x), -1) @ params[pool]

    params = {**PARAMS, "all": PARAMS["dense"], "windows": np.tile(PARAMS["dense"], (6, 1))}
    model = jaxqat.calibrate(jaxqat.quantize(function), {"params": params}, batches=[X])
    graph = jaxqat.convert(model, X[:2])
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert (check.differing, check.failures) == (0, ())
    quantized = jaxqat.quantize(function)
    trained, _ = quantized.apply(model.variables, X, mutable=["quant"])
    exact = function(params, X)
    for found in (jaxqat.make_executor(graph)(X), model(X), trained):
        assert sqnr.decibels(exact, found) > 25


def filled(value):
    """Elements beyond the end of a tensor of codes, which have a value of their own."""

    def change(y):
        return jnp.tanh(y).at[:, np.array([0, 9, 3, 9])].get(mode="fill", fill_value=value)

    return between(change)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_value_for_places_beyond_the_end_is_not_lost(value):
    function = filled(value)
    model = jaxqat.calibrate(jaxqat.quantize(function), {"params": PARAMS}, batches=[X])
    assert sqnr.decibels(function(PARAMS, X), model(X)) > 25
    with pytest.raises(ConversionError, match=r"gives .* for places beyond the end .* mode='clip'"):
        jaxqat.convert(model, X[:2])


def test_a_result_beyond_the_end_is_refused():
    def function(params, x):
        return jnp.take(jax.nn.relu(conv(x, params["first"])), np.array([0, 9]), axis=1)

    model = jaxqat.calibrate(jaxqat.quantize(function), {"params": PARAMS}, batches=[X])
    graph = jaxqat.convert(model, X[:2])  # An island: NaN there, as in the model.
    result = jaxqat.make_executor(graph)(X)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(model(X)))
