"""Networks with float islands: convert, run, verify, store, and refuse what no island can hold."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer import float_cases, graphs
from plain import others_long
from references import integer_graph, sqnr

import jaxqat
from jaxqat.errors import GraphError
from jaxqat.export import run_onnx
from jaxqat.export._onnx.model import onnx_model
from jaxqat.integer import graph as g
from jaxqat.integer._compare import TensorCheck, Verification

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8, 8, 3)).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)


PARAMS = {
    "first": {"kernel": normal(3, 3, 3, 8), "bias": normal(8)},
    "second": {"kernel": normal(3, 3, 8, 8)},
    "head": {"kernel": normal(8, 5)},
}


def conv(x, params, strides=(1, 1), **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, params["kernel"], strides, "SAME", dimension_numbers=numbers, **options
    )


def head(p, x):
    return x.mean((1, 2)) @ p["head"]["kernel"]


def network(between, end=lambda x: x, start=lambda x: x):
    """Two convolutions and a dense layer with functions between."""

    def function(p, x):
        x = conv(start(x), p["first"]) + p["first"]["bias"]
        return end(head(p, conv(between(x), p["second"])))

    return function


def normalized(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def attention(x):
    n, rows, columns, channels = x.shape
    x = x.reshape(n, rows * columns, channels)
    weights = jax.nn.softmax(x @ x.transpose(0, 2, 1) / 3)
    return (weights @ x).reshape(n, rows, columns, channels)


def time_major(x):
    """Quantized where its first axis is not the batch."""
    return jnp.tanh(x.transpose(1, 0, 2, 3)).transpose(1, 0, 2, 3)


def repeated(x):
    return jnp.tile(jax.nn.softplus(x[:, :4]), (1, 2, 1, 1))


def picked(x):
    """Rows by constant indices, as in resizing to the nearest; and columns, which come first."""
    x = jnp.tanh(x * x[:, :1])[:, jnp.array([0, 0, 2, 3, 3, 5, 6, 7])]
    numbers = jax.lax.GatherDimensionNumbers((1, 2, 3), (2,), (2,))
    sizes = (x.shape[0], 8, 1, 8)
    return jax.lax.gather(x, jnp.array([[1], [4], [5]]), numbers, sizes).transpose(1, 2, 0, 3)


def many(x):
    """What models have between layers, one after the other."""
    x = jnp.clip(jnp.where(x > 0, x, 0.1 * x), -2, 3)
    x = jnp.stack([x, jnp.flip(x, 2)]).sum(0) + jnp.cumsum(x, 1) * 0.1
    x = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, 1:]
    x = x**3 / (1 + jnp.abs(x) ** 3) + jnp.exp(-(x**2)) - jax.scipy.special.erf(x)
    best = jnp.argmax(x, -1, keepdims=True)
    return x + 0.1 * (best == jnp.arange(8)) + jnp.log1p(jnp.max(jnp.abs(x), (1, 2), keepdims=True))


MODELS = {
    "normalization": network(normalized),
    "attention": network(attention),
    "a term that is repeated": network(
        lambda x: jax.nn.relu(x + jnp.tanh(x).mean((1, 2), keepdims=True))
    ),
    "time first": network(time_major),
    "repeated rows": network(repeated),
    "picked rows": network(picked),
    "many": network(many),
    "a softmax at the end": network(jax.nn.relu, jax.nn.softmax),
    "a ReLU at the end": network(jax.nn.relu, jax.nn.relu),
    "a function of the input": network(jax.nn.relu, start=lambda x: jnp.tanh(x / 255 - 0.5)),
}  # fmt: skip


def calibrated(function, x: np.ndarray = X, recipe: jaxqat.Recipe | str = "int8"):
    return jaxqat.calibrate(function, {"params": PARAMS}, batches=[x], recipe=recipe)


PLAIN = ("normalization", "attention", "time first", "many", "a softmax at the end")


@pytest.mark.parametrize("name", others_long(MODELS, PLAIN))
def test_a_model_with_parts_in_float_becomes_a_network_that_computes_the_same(name, tmp_path):
    model = calibrated(MODELS[name])
    with pytest.raises(jaxqat.ConversionError):
        jaxqat.convert(model, X[:2], strict=True)
    graph = jaxqat.load(jaxqat.save(jaxqat.convert(model, X[:2]), tmp_path / "network"))
    assert graph.float_ops
    check = jaxqat.verify(model, graph=graph, batches=[X, X[:1] * 2])
    assert (check.differing, check.failures) == (0, ())
    assert check.codes + check.island_codes > 1000
    assert check.end_to_end is None or check.end_to_end < 1e-2 * (check.codes + check.island_codes)
    # And it is as good as the model: 8 bits of 3 layers leave more than 20 dB.
    real = np.asarray(MODELS[name](PARAMS, X))
    found = np.asarray(jaxqat.make_executor(graph)(X))
    assert found.shape == real.shape
    noise = ((found - real) ** 2).sum()
    assert 10 * np.log10((real**2).sum() / noise) > 20


AVERAGES = {
    "a bias": lambda x: x + 0.5,
    "a negative factor": lambda x: -x,
    "a factor for each channel": lambda x: x * jnp.linspace(-1, 2, 8) - 0.1,
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_that_is_more_than_that_is_an_integer_product(name):
    def function(p, x):
        return AVERAGES[name](jax.nn.relu(conv(x, p["first"])).mean((1, 2))) @ p["head"]["kernel"]

    model = calibrated(function)
    graph = jaxqat.convert(model, X[:2], strict=True)
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert (check.differing, check.failures, graph.float_ops) == (0, (), ())
    assert [len(p.weights.shape) for p in graph.products()] == [4, 4, 2]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_graph_with_islands_gives_what_numpy_computes(platform):
    graph = float_cases.island()
    pixels = graphs.pixels(graph, 11)
    codes, result = integer_graph.run(graph, pixels)
    executor = jaxqat.make_executor(graph, platform=platform)
    given = {name: codes[name] for name in graph.entries}
    assert list(given) == ["swish/codes"]
    parts, found = executor.segments(given, pixels)
    for name, wanted in codes.items():
        if name not in graph.entries:
            np.testing.assert_array_equal(parts[name], wanted, err_msg=name)
    np.testing.assert_allclose(found, result, rtol=1e-5)
    np.testing.assert_allclose(executor(pixels).sum(-1), 1, rtol=1e-5)


def test_a_stablehlo_file_has_the_islands_for_any_batch(tmp_path):
    graph = float_cases.island()
    pixels = graphs.pixels(graph, 5)
    jaxqat.export_stablehlo(graph, tmp_path / "network", input="uint8")
    run = jaxqat.load_stablehlo(tmp_path / "network")
    expected = jaxqat.make_executor(graph)(pixels)
    for count in (5, 2):
        np.testing.assert_allclose(run(pixels[:count]), expected[:count], rtol=1e-5)


def test_islands_have_a_place_operations_inputs_and_outputs():
    swish, softmax = float_cases.island().islands
    assert (swish.operations, swish.inputs) == ({"logistic": 1, "mul": 1}, ("conv1/real",))
    assert (softmax.inputs, softmax.outputs) == (("logits",), ("softmax",))
    assert str(softmax) == "the model: exp, reduce_sum, reshape, div"
    assert repr(float_cases.island()).endswith("2 float islands)")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm(name="norm")(nn.Dense(8, name="first")(x))
            return nn.Dense(5, name="second")(nn.gelu(x))

    x = X[:, 0, 0]
    model = jaxqat.calibrate(Block(), Block().init(jax.random.key(0), x), batches=[x])
    (island,) = jaxqat.convert(model, x).islands
    assert island.name == "Block"
    assert island.operations["rsqrt"] == island.operations["tanh"] == 1
    assert island.inputs == ("first/real",)
    graph = jaxqat.convert(model, x)
    by_name = {
        tensor.name: tensor.island
        for tensor in jaxqat.verify(model, graph=graph, batches=[x]).tensors
    }
    assert by_name == {"first/input": "", "second/input": "Block"}
    told = {entry.key: entry.value for entry in onnx_model(graph).metadata_props}
    assert json.loads(told["islands"]) == [str(island)]
    text = str(jaxqat.describe(model, x))
    assert "100.0 % of the MACs multiply integers" in text
    assert "no integer form: second/input: the normalization Block/norm" in text


def test_each_step_of_a_recurrent_layer_is_an_integer_product_and_its_weights_are_stored_once(
    tmp_path,
):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.SimpleCell(8))(nn.Dense(8)(x))
            return nn.Dense(5)(jnp.asarray(x)[:, -1])

    x = X[..., 0]  # 8 times of 8 numbers.
    variables = Recurrent().init(jax.random.key(0), x)
    model = jaxqat.calibrate(Recurrent(), variables, batches=[x])
    graph = jaxqat.convert(model, x[:2])
    assert not any(op.operation in ("dot", "conv") for op in graph.float_ops)
    assert sum(1 for _ in graph.products()) == 2 + 2 * 8
    check = jaxqat.verify(model, graph=graph, batches=[x])
    assert (check.differing, check.failures) == (0, ())
    stored = jaxqat.save(graph, tmp_path / "network") / "arrays.npz"
    with np.load(stored) as arrays:
        weights = [a for name in arrays if (a := arrays[name]).dtype == np.int8 and a.size == 64]
    assert len(weights) == 3  # The first layer, what the cell reads, what it had before.
    pairs = zip(jaxqat.load(tmp_path / "network").nodes, graph.nodes, strict=True)
    for loaded, node in pairs:
        jax.tree.map(np.testing.assert_array_equal, vars(loaded), vars(node))


def test_float_constants_count_as_bytes():
    model = calibrated(MODELS["normalization"])
    before = jaxqat.convert(model, X[:2]).size_bytes()
    shift = normal(8, 8, 8)
    shifted = calibrated(network(lambda x: normalized(x) + shift))
    assert jaxqat.convert(shifted, X[:2]).size_bytes() == before + 4 * 8**3


def test_the_readers_of_an_entry_see_the_given_codes_and_it_shows_its_own():
    graph = float_cases.island()
    pixels = graphs.pixels(graph, 3)
    executor = jaxqat.make_executor(graph)
    own = executor.codes(pixels)
    zeros = {"swish/codes": np.full_like(own["swish/codes"], 7)}
    parts, _ = executor.segments(zeros, pixels)
    np.testing.assert_array_equal(parts["swish/codes"], own["swish/codes"])
    behind = np.asarray(parts["conv2/output"])
    assert (behind[:, 1:-1, 1:-1] == behind[:, 1:2, 1:2]).all()  # Of one value everywhere.
    assert not np.array_equal(behind, own["conv2/output"])


def test_a_layer_that_the_recipe_leaves_in_float_is_an_operation_on_real_numbers():
    rule = jaxqat.Rule(path="second", weight_bits=None, act_bits=None)
    model = calibrated(network(jax.nn.relu), recipe=jaxqat.Recipe(rules=(rule,)))
    graph = jaxqat.convert(model, X[:2])
    assert [node.operation for node in graph.float_ops if node.operation == "conv"] == ["conv"]
    assert [product.name for product in graph.products()] == ["first", "head"]
    assert jaxqat.verify(model, graph=graph, batches=[X]).failures == ()


RECIPES = {
    "dynamic ranges": "int8_dynamic",
    "groups": jaxqat.Recipe(
        weight_bits=4,
        rules=(jaxqat.Rule(kind="dense", weight_granularity="per_group", group_size=4),),
    ),
    "a range per layer": "w4a4",
}


@pytest.mark.parametrize("name", RECIPES)
def test_other_recipes_become_networks_that_compute_the_same(name):
    model = calibrated(network(jax.nn.swish), recipe=RECIPES[name])
    graph = jaxqat.convert(model, X[:2])
    found = np.asarray(jaxqat.make_executor(graph)(X))
    # A code may differ by a rounding, where the quantized network itself is 1 of 15 steps off.
    np.testing.assert_allclose(found, model(X), atol=2e-2 * np.abs(found).max())
    check = jaxqat.verify(model, graph=graph, batches=[X])
    assert check.differing == 0
    assert name == "dynamic ranges" or check.failures == ()


def test_islands_of_a_bfloat16_model_compute_in_bfloat16(tmp_path):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.swish(nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x))
            x = nn.LayerNorm(dtype=jnp.bfloat16)(x + nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x))
            return nn.softmax(nn.Dense(5, dtype=jnp.bfloat16)(x.mean((1, 2))))

    model = jaxqat.calibrate(Half(), Half().init(jax.random.key(0), X), batches=[X])
    graph = jaxqat.convert(model, X)
    assert {node.dtype for node in graph.float_ops} == {"float32", "bfloat16"}
    found, wanted = np.asarray(jaxqat.make_executor(graph)(X)), np.asarray(model(X))
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found.astype("f"), wanted.astype("f"), atol=2**-7)
    assert jaxqat.verify(model, graph=graph, batches=[X]).differing == 0
    # NumPy's files have no such type.
    loaded = jaxqat.load(jaxqat.save(graph, tmp_path / "network"))
    np.testing.assert_array_equal(jaxqat.make_executor(loaded)(X), found)


def test_islands_of_a_float16_model_are_exported(tmp_path):
    def half(p, x):
        x = conv(x, p["first"]).astype(jnp.float16)
        x = (x - x.mean(-1, keepdims=True)) * jnp.float16(1.5)
        return head(p, conv(x.astype(jnp.float32), p["second"]))

    model = calibrated(half)
    graph = jaxqat.convert(model, X[:2])
    assert {node.dtype for node in graph.float_ops} >= {"float16"}
    path = jaxqat.export_onnx(graph, tmp_path / "network.onnx")
    found, wanted = run_onnx(path, X)[0], np.asarray(jaxqat.make_executor(graph)(X))
    # Both round in float16, to 2**-11, in another order: each code of 2**-8 moves with a chance of
    # up to 2 * 2**-11 / 2**-8, a quarter. A step squared times that is three times the noise of
    # rounding to codes, a twelfth: 5 dB more than that of a tensor of 8 bits, of 35 dB and more.
    assert sqnr.decibels(wanted, found) > 30


def test_a_long_recurrence_converts():
    def recurrent(p, x):
        state = jnp.zeros((x.shape[0], 8))
        for step in range(100):
            gate = jax.nn.sigmoid(x[:, step % 8, 0] @ p["wide"]["kernel"])
            state = state * gate + jnp.tanh(state) * (1 - gate)
        return state @ p["head"]["kernel"]

    params = {**PARAMS, "wide": {"kernel": normal(3, 8)}}
    model = jaxqat.calibrate(recurrent, {"params": params}, batches=[X])
    graph = jaxqat.convert(model, X[:2])
    assert len(graph.float_ops) > 500
    np.testing.assert_allclose(jaxqat.make_executor(graph)(X), model(X), atol=1e-2)


def test_codes_that_an_island_makes_are_judged_apart():
    island = TensorCheck("a", 10_000, 9, 1, None, of_island=True, island="block/norm")
    integer = TensorCheck("b", 10_000, 0, 0, None)

    def check(*tensors, flips=0):
        return Verification(tensors, 100, flips, None, end_to_end=9)

    assert check(island, integer, flips=1).failures == ()
    assert "float islands: 9 of 10,000 codes that they make differ; end to end 9 of 20,000" in str(
        check(island, integer)
    )
    assert "a, made by block/norm: 9 of 10,000" in str(check(island, integer))
    worse = dataclasses.replace(island, differing=50)
    assert "codes that float islands make differ" in check(worse, integer).failures[0]
    assert "differs by 2" in check(dataclasses.replace(island, largest=2), integer).failures[0]
    assert (
        "1 of 10000 codes differ"
        in check(island, dataclasses.replace(integer, differing=1)).failures[0]
    )
    assert "2 of 100 images" in check(island, integer, flips=2).failures[0]


REFUSED = {
    "a loop": (
        network(lambda x: jax.lax.while_loop(lambda c: c.max() > 1, lambda c: c * 0.5, x)),
        r"second/input: 'while' is a loop whose number of iterations depends on the data",
    ),
    "a call of Python": (
        network(lambda x: jax.pure_callback(np.asarray, jax.typeof(x), x)),
        "'pure_callback' is a call of Python",
    ),
    "a sort": (network(lambda x: jnp.sort(x, -1)), "'sort' is an operation that float islands"),
    "a result without a batch": (
        lambda p, x: (head(p, conv(x, p["first"])), jnp.float32(3.5)),
        r"the model's output/1: \(\) is the same for every input",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_island_can_hold_is_refused_by_name(name):
    function, match = REFUSED[name]
    with pytest.raises(jaxqat.ConversionError, match=match):
        jaxqat.convert(calibrated(function), X[:2])


def test_an_operation_that_mixes_the_examples_of_a_batch_is_refused():
    mixed = network(lambda x: jax.nn.relu(x - x.max(0)))
    with pytest.raises(jaxqat.ConversionError, match="'reduce_max' mixes the examples of a batch"):
        jaxqat.convert(calibrated(mixed), X[:2])


def test_a_model_of_one_batch_size_cannot_have_islands():
    fixed = network(lambda x: jnp.cumsum(x.reshape(2, 8, 8, 8), 1))
    with pytest.raises(jaxqat.ConversionError, match="must run with any batch size: it ran with 2"):
        jaxqat.convert(calibrated(fixed, X[:2]), X[:2])


def test_preprocess_needs_an_input_that_is_quantized_at_once():
    model = calibrated(MODELS["a function of the input"])
    with pytest.raises(jaxqat.ConversionError, match="preprocess needs a model whose input is"):
        jaxqat.convert(model, X[:2], preprocess=lambda x: x.astype(jnp.float32))


def test_integer_inputs_are_the_type_of_the_network():
    table = jnp.asarray(normal(9, 8))

    def function(p, tokens):
        return table[tokens].mean(1) @ p["head"]["kernel"]

    tokens = RNG.integers(0, 9, (6, 4))
    model = calibrated(function, tokens)
    graph = jaxqat.convert(model, tokens)
    assert (graph.input_type, graph.input_shape) == ("int32", (4,))
    assert jaxqat.verify(model, graph=graph, batches=[tokens]).failures == ()
    with pytest.raises(jaxqat.ExecutionError, match="inputs must be int32, got float32"):
        jaxqat.make_executor(graph)(tokens.astype(np.float32))


GRAPH = float_cases.island()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"operation": "fft"}, "node 'logistic': operation 'fft' is not known"),
        ({"attributes": {"axes": [1]}}, r"'logistic' has the attributes \[\], got \['axes'\]"),
        ({"constants": (None, None)}, "has 1 inputs, and 2 of its operands are no constants"),
        ({"constants": (np.array([None]),)}, "has 1 inputs, and 0 of its operands"),
        ({"inputs": ("nothing",)}, "reads 'nothing', which no node before it makes"),
        ({"output": "input"}, "makes 'input', which an earlier node makes already"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_a_float_operation_that_is_wrong_is_refused(changes, match):
    nodes = [
        dataclasses.replace(node, **changes) if node.name == "logistic" else node
        for node in GRAPH.nodes
    ]
    with pytest.raises(GraphError, match=match):
        dataclasses.replace(GRAPH, nodes=tuple(nodes))


def test_only_float_operations_and_quantize_nodes_read_real_tensors():
    nodes = [
        dataclasses.replace(node, inputs=("swish",)) if node.name == "conv2" else node
        for node in GRAPH.nodes
    ]
    with pytest.raises(GraphError, match="node 'conv2': reads 'swish', which no node before it"):
        dataclasses.replace(GRAPH, nodes=tuple(nodes))


def test_a_quantized_tensor_has_the_batch_first():
    nodes = [
        dataclasses.replace(node, shape=[7, {"batch": 1}, 6, 6]) if node.name == "swish" else node
        for node in GRAPH.nodes
    ]
    with pytest.raises(GraphError, match=r"node 'swish': makes the shape .* first axis is not"):
        dataclasses.replace(GRAPH, nodes=tuple(nodes))


def test_the_input_is_read():
    node = g.FloatOp(
        name="one", inputs=(), output="one", operation="broadcast",
        attributes={"shape": [{"batch": 1}], "axes": []}, constants=(np.ones((), np.float32),),
        shape=[{"batch": 1}], dtype="float32",
    )  # fmt: skip
    outputs = (g.Output(name="one", shape=()),)
    with pytest.raises(GraphError, match="no Quantize or FloatOp node reads the input 0"):
        g.IntegerGraph(inputs=(g.Input(shape=(2,)),), tensors={}, nodes=(node,), outputs=outputs)
    with pytest.raises(GraphError, match="inputs: a network reads one array or more"):
        g.IntegerGraph(inputs=(), tensors={}, nodes=(node,), outputs=outputs)
