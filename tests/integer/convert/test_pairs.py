"""Products of two activations, as in attention, become integer products by a rule."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import integer_graph, sqnr

import jaxqat
from jaxqat.export import run_onnx
from jaxqat.integer import graph as g
from jaxqat.integer._execute.base import Platform
from jaxqat.integer._execute.cpu import MAX_PAIRS, Cpu
from jaxqat.integer._execute.executor import make_executor
from jaxqat.quant.recipe import Recipe, Rule

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
RULE = Rule(kind="attention")
X = RNG.normal(size=(6, 5, 12)).astype(np.float32)
PARAMS = {
    "q": RNG.normal(size=(12, 12)) / 3,
    "k": RNG.normal(size=(12, 12)) / 3,
    "v": RNG.normal(size=(12, 12)) / 3,
    "head": RNG.normal(size=(12, 4)) / 3,
}
PARAMS = {name: values.astype(np.float32) for name, values in PARAMS.items()}


def heads(x):
    return x.reshape(*x.shape[:-1], 3, 4)


def by_einsum(q, k, v):
    """As `nn.MultiHeadDotProductAttention` multiplies, without the softmax."""
    weights = jnp.einsum("...qhd,...khd->...hqk", heads(q), heads(k))
    return jnp.einsum("...hqk,...khd->...qhd", weights, heads(v)).reshape(q.shape)


def by_matmul(q, k, v):
    return (q @ k.transpose(0, 2, 1)) @ v


def heads_first(q, k, v):
    q, k, v = (heads(x).transpose(0, 2, 1, 3) for x in (q, k, v))
    mixed = (q @ jnp.swapaxes(k, -1, -2)) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(*mixed.shape[:1], 5, 12)


def mapped(q, k, v):
    """`jax.vmap` over the examples, and over the heads of each."""

    def of_head(q, k, v):
        return (q @ k.T) @ v

    def of_example(q, k, v):
        return jax.vmap(of_head, 1, 1)(heads(q), heads(k), heads(v)).reshape(q.shape)

    return jax.vmap(of_example)(q, k, v)


def linear(q, k, v):
    """Linear attention: keys and values first, places are summed over."""
    return jnp.einsum("bqhd,bhde->bqhe", heads(q), jnp.einsum("bkhd,bkhe->bhde", heads(k), heads(v))
    ).reshape(q.shape)  # fmt: skip


def library(q, k, v):
    """As NNX attends: the softmax's result has an axis of size 1 before the batch."""
    return jax.nn.dot_product_attention(heads(q), heads(k), heads(v)).reshape(q.shape)


def grouped(q, k, v):
    """Grouped-query attention: several heads of queries for one of keys and values."""
    k, v = (jnp.repeat(heads(x)[:, :, :1], 3, 2) for x in (k, v))
    weights = jnp.einsum("bqhd,bkhd->bhqk", heads(q), k)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(q.shape)


def over_two_axes(q, k, v):
    """Sums over heads and channels; the result is a channel's weight for each place."""
    return v * jnp.einsum("bqhd,bkhd->bqk", heads(q), heads(k)).mean(-1, keepdims=True)


LAYOUTS = {
    f.__name__: f
    for f in (
        *(by_einsum, by_matmul, heads_first, mapped),
        *(linear, library, grouped, over_two_axes),
    )
}


def network(layout):
    def apply(params, x):
        mixed = layout(*(x @ params[name] for name in "qkv"))
        return mixed @ params["head"]

    return apply


def calibrated(function, rules=(RULE,), batches=(X,), **options):
    recipe = Recipe(rules=rules, **options)
    return jaxqat.calibrate(function, {"params": PARAMS}, batches=batches, recipe=recipe)


def in_float(graph):
    return [op for op in graph.float_ops if op.operation == "dot"]


def assert_same_results(graph, found, expected):
    if graph.float_ops:  # A last bit in an island can move a code behind it to its neighbour.
        assert sqnr.decibels(expected, found) > 40
    else:
        np.testing.assert_array_equal(found, expected)


# What the layout and the zero point do has nothing in common.
SYMMETRIC = ("by_einsum", "grouped")
CASES = [(layout, "affine") for layout in LAYOUTS] + [
    pytest.param(layout, "symmetric", marks=() if layout in SYMMETRIC else pytest.mark.long)
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("layout", "activations"), CASES)
def test_training_and_every_runtime_compute_the_same_codes(layout, activations, tmp_path):
    function = network(LAYOUTS[layout])
    model = calibrated(function, activations=activations)
    graph = jaxqat.load(jaxqat.save(jaxqat.convert(model, X[:2]), tmp_path / "network"))
    pairs = [node for node in graph.nodes if isinstance(node, g.MatMul)]
    assert len(pairs) == (1 if layout == "over_two_axes" else 2)
    assert not in_float(graph)

    check = jaxqat.verify(model, graph=graph, batches=[X, X[:1] * 2])
    assert (check.differing, check.failures) == (0, ())
    if layout not in ("library", "over_two_axes"):  # A softmax, a mean over places.
        assert not graph.float_ops and not check.island_codes

    codes, result = integer_graph.run(graph, X)
    given = {name: codes[name] for name in graph.entries}  # One last bit in an island moves them.
    for platform in (Platform, Cpu):
        values = platform(graph).visit([jnp.asarray(X)], platform(graph).parameters, given)
        for name, expected in codes.items():
            found = platform(graph).codes(name, values[name])
            if name not in graph.entries:
                np.testing.assert_array_equal(found, expected, err_msg=f"{platform} {name}")
    assert_same_results(graph, make_executor(graph)(X), result)
    # Up to seven tensors of 8 bits one behind the other.
    assert sqnr.decibels(function(PARAMS, X), result) > 20

    path = jaxqat.export_onnx(graph, tmp_path / "network.onnx")
    found, onnx_codes = run_onnx(path, X, expose=True)
    if not graph.float_ops:
        for name, expected in codes.items():
            np.testing.assert_array_equal(onnx_codes[name], expected, err_msg=name)
    assert_same_results(graph, found, result)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, name="attention")(x, x)
        return nn.Dense(4, name="head")(x)


def test_only_the_softmax_of_flax_attention_is_an_island():
    variables = Attention().init(jax.random.key(0), X)
    recipe = Recipe(rules=(RULE,))
    model = jaxqat.calibrate(Attention(), variables, batches=[X], recipe=recipe)
    graph = jaxqat.convert(model, X[:2])
    assert sum(isinstance(node, g.MatMul) for node in graph.nodes) == 2
    (island,) = graph.islands
    assert "exp" in island.operations and "dot" not in island.operations
    (scores,) = island.inputs
    assert scores not in graph.tensors  # The sums are multiplied once, and not rounded.
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert (check.differing, check.failures) == (0, ())
    assert check.codes and check.island_codes
    text = str(jaxqat.describe(model, X))
    assert "100.0 % of the MACs multiply integers" in text
    exact = Attention().apply(variables, X)
    assert sqnr.decibels(exact, jaxqat.make_executor(graph)(X)) > 25


@pytest.mark.parametrize("batch", [2, 5], ids=["", "as many examples as places"])
def test_operands_with_the_time_first_are_multiplied_as_the_model_does(batch):
    def time_first(q, k, v):
        q, k, v = (x.transpose(1, 0, 2) for x in (q, k, v))
        scores = jnp.einsum("qbd,kbd->bqk", q, k)
        return jnp.einsum("bqk,kbd->bqd", scores, v)

    function = network(time_first)
    model = calibrated(function)
    graph = jaxqat.convert(model, X[:batch])
    assert sum(isinstance(n, g.MatMul) for n in graph.nodes) == 2
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert (check.differing, check.failures) == (0, ())
    assert sqnr.decibels(function(PARAMS, X), make_executor(graph)(X)) > 20


def test_a_product_of_examples_with_each_other_is_an_error():
    model = calibrated(lambda p, x: (x @ p["q"]).mean(1) @ (x @ p["k"]).mean(1).T @ p["head"][:6])
    with pytest.raises(jaxqat.ConversionError, match="batch"):
        jaxqat.convert(model, X)


def test_sums_that_may_overflow_stay_in_float():
    """Their zero points are known too late to know whether they do."""
    length = 2**31 // 255**2 + 1
    x = RNG.normal(size=(2, length, 3)).astype(np.float32)
    params = {name: RNG.normal(size=(3, 4)).astype(np.float32) for name in "kvh"}

    def gram(p, x):
        k, v = (jax.nn.relu(x @ p[name]) for name in "kv")
        return jnp.einsum("bkd,bke->bde", k, v) @ p["h"].T

    recipe = Recipe(rules=(RULE,))
    model = jaxqat.calibrate(gram, {"params": params}, batches=[x], recipe=recipe)
    graph = jaxqat.convert(model, x)
    assert in_float(graph)
    check = jaxqat.verify(model, graph=graph, batches=[x])
    assert (check.differing, check.failures) == (0, ())
    shorter = jaxqat.convert(model, x[:, :-1])
    assert not in_float(shorter)


def test_long_sums_are_exact_on_a_cpu():
    """More products than float32 holds the sum of, all of the largest codes."""
    length = 2 * MAX_PAIRS + 5
    tensors = {
        name: g.Tensor(name=name, shape=shape, scale=np.float32(1), zero_point=-128)
        for name, shape in (("input", (2, length)), ("pair", (2, 2)))
    }
    quantize = g.Quantize(name="quantize", inputs=(g.INPUT,), output="input", inverse=np.float32(1))
    node = g.MatMul(
        name="pair", inputs=("input", "input"), output="pair", contracted=((2,), (2,)),
        batched=((0,), (0,)), multiplier=np.float32(2**-18),
    )  # fmt: skip
    graph = g.IntegerGraph(
        inputs=(g.Input(shape=(2, length)),), tensors=tensors, nodes=(quantize, node),
        outputs=(g.Output(name="pair", shape=(2, 2)),),
    )  # fmt: skip
    cpu = Cpu(graph)
    x = np.full((1, 2, length), 255, np.uint8)
    x[0, 1, :3] = (254, 1, 0)
    left = jnp.asarray(x)
    sums = cpu.sums_of_pairs(node, left, left.transpose(0, 2, 1))
    expected = np.einsum("bqk,bpk->bqp", x.astype(np.int64), x.astype(np.int64))
    assert expected.max() > 2**24
    np.testing.assert_array_equal(sums, expected)


BROKEN = {
    "three inputs": ({"inputs": ("x", "x", "x")}, "has 3 inputs; it multiplies two"),
    "another size": ({"contracted": ((1,), (2,))}, r"sums over axes of the sizes \[4\] and \[3\]"),
    "no such axis": ({"contracted": ((3,), (2,))}, "which are not axes of"),
    "an axis twice": ({"contracted": ((2, 2), (2, 2))}, "which are not axes of"),
    "other counts": ({"contracted": ((2, 1), (2,))}, "not as many for both tensors"),
    "no batch": ({"batched": ((), ())}, "of which 0 is not the first"),
    "a multiplier of 0": ({"multiplier": np.float32(0)}, "multiplier is not positive"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_graph_checks_products_of_two_tensors(case):
    changes, message = BROKEN[case]
    fields = {
        "name": "pair", "inputs": ("x", "x"), "output": "y", "contracted": ((2,), (2,)),
        "batched": ((0,), (0,)), "multiplier": np.float32(0.5),
    }  # fmt: skip
    node = g.MatMul(**{**fields, **changes})
    x = g.Tensor(name="x", shape=(4, 3), scale=np.float32(1), zero_point=0)
    with pytest.raises(jaxqat.GraphError, match=message):
        node.check([x] * len(node.inputs), None)
        node.output_shape([x.shape] * len(node.inputs))


def test_a_sum_that_may_overflow_is_refused():
    x = g.Tensor(name="x", shape=(1, 2**31 // 255**2 + 1), scale=np.float32(1), zero_point=-128)
    node = g.MatMul(
        name="pair", inputs=("x", "x"), output="y", contracted=((2,), (2,)),
        batched=((0,), (0,)), multiplier=np.float32(1),
    )  # fmt: skip
    with pytest.raises(jaxqat.GraphError, match=r"can reach 21475\d+, beyond int32"):
        node.check([x, x], None)


def test_both_operands_train():
    """Gradients reach the parameters of both operands, and the loss falls."""
    model = calibrated(network(by_einsum))
    target = RNG.normal(size=(6, 5, 4)).astype(np.float32)

    def loss(params):
        return jnp.mean((model.with_variables(params=params)(X) - target) ** 2)

    value, gradient = jax.value_and_grad(loss)(PARAMS)
    assert all(float(jnp.abs(gradient[name]).max()) > 0 for name in PARAMS)
    norm = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient))
    after = jax.tree.map(lambda p, g: p - 0.01 * value / norm * g, PARAMS, gradient)
    assert loss(after) < value


@pytest.mark.parametrize(
    "batch", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 3, 4, 5, 6))]
)
def test_a_batch_as_long_as_another_axis_makes_no_difference(batch):
    def function(params, x):  # Two groups of two heads, five places.
        q, k, v = (x @ params[name] for name in "qkv")
        q = q.reshape(*x.shape[:2], 4, 3)
        k, v = (y[..., :6].reshape(*x.shape[:2], 2, 3) for y in (k, v))
        mixed = jax.nn.dot_product_attention(q, k, v)  # The groups come before the batch.
        return mixed.reshape(x.shape) @ params["head"]

    model = calibrated(function)
    graph = jaxqat.convert(model, X[:batch])
    assert sum(isinstance(node, g.MatMul) for node in graph.nodes) == 2
    assert not in_float(graph)
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert (check.differing, check.failures) == (0, ())
