"""Constants that differ by place, and inputs that the model scales, need no float island."""

import equinox as eqx
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
from jaxqat.errors import ConversionError, GraphError
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5, 4, 3)).astype(np.float32)
PIXELS = RNG.integers(0, 256, X.shape).astype(np.uint8)
IMAGES = PIXELS.astype(np.float32)
MEAN = np.array([0.49, 0.48, 0.44], np.float32)
DEVIATION = np.array([0.24, 0.25, 0.26], np.float32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {
    "first": normal(3, 3, 3, 6) / 3,
    "second": normal(3, 3, 6, 4) / 3,
    "third": np.eye(6, dtype=np.float32)[None, None],
    "head": normal(80, 3) / 3,
    "places": normal(1, 5, 4, 6) * 0.1,
    "rows": normal(5, 1, 1),
    "mask": (RNG.random((5, 4, 1)) > 0.3).astype(np.float32),
    "channels": normal(6),
    "token": normal(1, 1, 4, 6),
    "image": RNG.uniform(0, 255, (5, 4, 3)).astype(np.float32),
}


def conv(x, weights):
    return lax.conv_general_dilated(
        x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def between(change):
    """A convolution, ReLU, what is tested, another convolution and a head."""

    def network(params, x):
        y = change(params, jax.nn.relu(conv(x, params["first"])))
        y = conv(y[:, -5:], params["second"])
        return y.reshape(len(x), -1) @ params["head"]

    return network


def before(change):
    """What is tested on the input, and the same network."""

    def network(params, x):
        return between(lambda _, y: y)(params, change(params, x))

    return network


def with_token(params, y, tokens):
    return jnp.concatenate([tokens, y], 1) + jnp.ones((1, 6, 4, 1)) * params["rows"][0]


# What is done to codes, and how many Affine nodes that takes.
CODES = {
    "positions": (lambda p, y: y + p["places"], 1),
    "positions first": (lambda p, y: p["places"] - y, 1),
    "a factor by place": (lambda p, y: y * (1 + p["places"]), 1),
    "a divisor by place": (lambda p, y: y / (2 + p["places"] ** 2), 1),
    "zeros by place": (lambda p, y: y * p["mask"] + p["places"], 1),
    "by rows": (lambda p, y: y * p["rows"] + p["rows"] ** 2, 1),
    "by channel, then by place": (lambda p, y: y * p["channels"] + p["places"], 1),
    "by place, then ReLU": (lambda p, y: jax.nn.relu(y + p["places"]), 1),
    "twice": (lambda p, y: (y + p["places"]) * p["mask"] + jnp.sin(p["places"]), 1),
    "a token, tiled": (
        lambda p, y: with_token(p, y, jnp.tile(p["token"], (len(y), 1, 1, 1))), 1,
    ),
    "a token, broadcast": (
        lambda p, y: with_token(p, y, jnp.broadcast_to(p["token"], (len(y), 1, 4, 6))), 1,
    ),
    "a token, then a function": (
        lambda p, y: jnp.tanh(with_token(p, y, jnp.tile(p["token"], (len(y), 1, 1, 1)))), 1,
    ),
    "positions, then tokens": (
        lambda p, y: jnp.concatenate(
            [jnp.tile(p["token"], (len(y), 1, 1, 1)), y * p["rows"] + p["places"],
             jnp.tile(-p["token"], (len(y), 1, 1, 1))], 1,
        )[:, :6], 1,
    ),
    "rows of a product": (
        lambda p, y: (conv(y, p["third"]) + p["rows"]) * p["mask"], 1,
    ),
    "an average without its padding": (
        lambda p, y: nn.avg_pool(y, (3, 3), padding="SAME", count_include_pad=False), 1,
    ),
    "zeros beside": (lambda p, y: jnp.concatenate([y, jnp.zeros((len(y), 2, 4, 6))], 1), 1),
    "a skip": (lambda p, y: y + jax.nn.relu(y + p["places"]), 1),
}  # fmt: skip
# What is done to the input, which is quantized then.
INPUTS = {
    "scaled": lambda p, x: x / 255,
    "normalized": lambda p, x: (x / 255 - MEAN) / DEVIATION,
    "centred": lambda p, x: -(127.5 - x) / 127.5,
    "less an image": lambda p, x: (x - p["image"]) * 0.01,
    "turned, then scaled": lambda p, x: jnp.swapaxes(jnp.swapaxes(x, 1, 2) / 255, 1, 2),
    "a factor of zero": lambda p, x: x / 255 * jnp.array([1.0, 0.0, -1.0]) + MEAN,
}
NETWORKS = {
    **{name: (between(change), X, affine) for name, (change, affine) in CODES.items()},
    **{name: (before(change), IMAGES, 0) for name, change in INPUTS.items()},
    # uint8 is codes; so is what is left of a mean image.
    "uint8 less an image": (
        before(lambda p, x: x.astype(jnp.float32) - p["image"]), PIXELS, 1,
    ),
}  # fmt: skip
PLAIN = {
    "zeros by place",
    "rows of a product",
    "positions, then tokens",
    "an average without its padding",
    "a token, tiled",
    "normalized",
    "uint8 less an image",
}


@pytest.mark.parametrize("name", others_long(NETWORKS, PLAIN))
def test_the_network_is_integer_throughout(name, tmp_path):
    function, x, affine = NETWORKS[name]
    model = jaxqat.calibrate(jaxqat.quantize(function), {"params": PARAMS}, batches=[x])
    graph = jaxqat.convert(model, x[:2], strict=True)
    graph = jaxqat.load(jaxqat.save(graph, tmp_path / "network"))
    assert sum(isinstance(node, g.Affine) for node in graph.nodes) == affine
    result = result_everywhere(model, graph, x, tmp_path / "network.onnx")
    # Four quantized tensors of 8 bits; centred ones have a bit less in effect.
    assert sqnr.decibels(function(PARAMS, x), result) > 25


def test_a_small_term_is_not_rounded_to_a_code(tmp_path):
    """A position embedding of a hundredth of a code still shows, as a mean over many images."""
    params = {"dense": np.eye(4, dtype=np.float32), "places": np.zeros((1, 3, 4), np.float32)}
    x = np.random.default_rng(1).normal(size=(4000, 3, 4)).astype(np.float32)
    params["places"][0, 1] = 2e-4  # A code is some 0.03.

    def network(params, x):
        return jax.nn.relu(x @ params["dense"] + params["places"]) @ params["dense"]

    model = jaxqat.calibrate(network, {"params": params}, batches=[x[:500]], recipe="int8")
    graph = jaxqat.convert(model, x[:1], strict=True)
    (node,) = [node for node in graph.nodes if isinstance(node, g.Affine)]
    scale = graph.tensors[node.inputs[0]].scale
    # Rounded to a 256th of a code: by at most half of one.
    np.testing.assert_allclose(
        node.bias * scale / 256, params["places"][0], atol=float(scale) / 512
    )
    assert node.bias[1].min() >= 1


def test_a_token_that_is_computed_is_an_island():
    """It is not seen that all examples have the same; calibration works as for other islands."""

    def change(params, y):
        tokens = (jnp.zeros((len(y), 1, 4, 6)) + params["token"]) * params["mask"][:1]
        return jnp.concatenate([tokens, y], 1)

    model = jaxqat.calibrate(jaxqat.quantize(between(change)), {"params": PARAMS}, batches=[X])
    graph = jaxqat.convert(model, X[:1])
    assert len(graph.islands) == 1
    assert jaxqat.verify(model, graph=graph, batches=[X]).failures == ()


def test_tokens_of_each_example_calibrate_and_are_refused():
    params = {**PARAMS, "each": normal(6, 1, 1, 1)}

    def change(params, y):
        tokens = jnp.broadcast_to(params["each"] * params["each"], (len(y), 1, 4, 6))
        return jnp.concatenate([tokens, y], 1)

    model = jaxqat.calibrate(jaxqat.quantize(between(change)), {"params": params}, batches=[X])
    with pytest.raises(ConversionError, match="batch"):
        jaxqat.convert(model, X)


@pytest.mark.parametrize("first", [True, False])
def test_the_difference_of_large_numbers_is_as_exact_as_in_float(first):
    """(x - mean) / deviation: as a difference of products it would lose 30 dB."""
    mean = np.float32(16_000_000)
    x = mean + np.random.default_rng(4).integers(-2, 3, X.shape).astype(np.float32)

    def change(params, x):
        return (x - mean) / 7 if first else -(mean - x) / 7 + 0.1

    model = jaxqat.calibrate(jaxqat.quantize(before(change)), {"params": PARAMS}, batches=[x])
    graph = jaxqat.convert(model, x[:1], strict=True)
    result = jaxqat.make_executor(graph)(x)
    assert sqnr.decibels(before(change)(PARAMS, x), result) > 30


def test_the_constants_train():
    model = jaxqat.quantize(between(CODES["zeros by place"][0]))
    variables = model.calibrate({"params": PARAMS}, X)

    def loss(params):
        result, _ = model.apply({**variables, "params": params}, X, mutable=["quant"])
        return jnp.mean(jnp.square(result))

    def in_float(params):
        return jnp.mean(jnp.square(between(CODES["zeros by place"][0])(params, X)))

    found, wanted = jax.grad(loss)(PARAMS), jax.grad(in_float)(PARAMS)
    for key in ("places", "mask", "first", "second"):
        similar = np.vdot(found[key], wanted[key])
        similar /= np.linalg.norm(found[key]) * np.linalg.norm(wanted[key])
        assert similar > 0.98, key  # 8 bits: the gradient's direction is that of float.


@pytest.mark.parametrize("shape", [(6, 5, 4, 6), (6, 1, 1, 6), (6, 1, 1, 1)])
def test_a_constant_of_each_example_is_refused(shape):
    """Only the batch that was converted has as many."""
    params = {**PARAMS, "places": normal(*shape)}

    def change(params, y):
        return y + jnp.broadcast_to(params["places"], y.shape)

    model = jaxqat.calibrate(jaxqat.quantize(between(change)), {"params": params}, batches=[X])
    with pytest.raises(ConversionError, match="batch"):
        jaxqat.convert(model, X)


def test_a_constant_that_is_repeated_for_the_examples_is_one(tmp_path):
    def change(params, y):
        return y + jnp.broadcast_to(params["places"], y.shape)

    model = jaxqat.calibrate(jaxqat.quantize(between(change)), {"params": PARAMS}, batches=[X])
    graph = jaxqat.convert(model, X[:1], strict=True)
    result_everywhere(model, graph, X, tmp_path / "network.onnx")


class VisionTransformer(nn.Module):
    """A class token and positions; blocks of dense layers alone, so that all is integer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2))(x).reshape(len(x), -1, 8)
        token = self.param("token", nn.initializers.normal(0.5), (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 8))
        for _ in range(2):
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(x)))
        return nn.Dense(4)(x.mean(1))


def test_a_class_token_and_positions_are_one_node(tmp_path):
    x = np.random.default_rng(2).normal(size=(5, 8, 8, 3)).astype(np.float32)
    module = VisionTransformer()
    variables = module.init(jax.random.key(0), x)
    model = jaxqat.calibrate(module, variables, batches=[x], recipe="int8")
    graph = jaxqat.convert(model, x[:1], strict=True)
    assert sum(isinstance(node, g.Affine) for node in graph.nodes) == 1
    result = result_everywhere(model, graph, x, tmp_path / "network.onnx")
    assert sqnr.decibels(module.apply(variables, x), result) > 25  # Ten quantized tensors.


class ChannelsFirst(eqx.Module):
    """Normalization by (channels, 1, 1), and positions behind a transposition."""

    conv: eqx.nn.Conv2d
    scale: jax.Array
    positions: jax.Array
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(3, 6, 2, 2, key=keys[0])
        self.scale = jax.random.normal(keys[1], (6, 1, 1))
        self.positions = jax.random.normal(keys[2], (16, 6)) / 5
        self.head = eqx.nn.Linear(96, 4, key=keys[3])

    def __call__(self, x):
        y = jax.nn.relu(self.conv(x)) * self.scale + self.scale**2
        return self.head(jax.nn.relu(y.reshape(6, -1).T + self.positions).reshape(-1))


def test_channels_may_be_another_axis(tmp_path):
    x = np.random.default_rng(3).normal(size=(5, 3, 8, 8)).astype(np.float32)
    module = ChannelsFirst(jax.random.key(0))
    model = jaxqat.calibrate(module, {"params": module}, batches=[x], recipe="int8")
    graph = jaxqat.convert(model, x[:1], strict=True)
    assert sum(isinstance(node, g.Affine) for node in graph.nodes) == 2
    result = result_everywhere(model, graph, x, tmp_path / "network.onnx")
    assert sqnr.decibels(jax.vmap(module)(x), result) > 25


def test_a_model_that_scales_its_input_takes_uint8_by_a_table():
    model = jaxqat.calibrate(
        jaxqat.quantize(before(INPUTS["normalized"])), {"params": PARAMS}, batches=[IMAGES]
    )
    graph = jaxqat.convert(model, IMAGES[:1], preprocess=lambda x: x.astype(jnp.float32))
    network = jaxqat.make_executor(graph)
    for key, codes in network.codes(PIXELS).items():
        np.testing.assert_array_equal(codes, network.codes(IMAGES)[key], err_msg=key)


def test_a_nan_of_a_scaled_input_has_the_code_of_zero():
    model = jaxqat.calibrate(
        jaxqat.quantize(before(INPUTS["normalized"])), {"params": PARAMS}, batches=[IMAGES]
    )
    graph = jaxqat.convert(model, IMAGES[:1])
    images = IMAGES.copy()
    images[1, 2, 3] = np.nan
    codes = jaxqat.make_executor(graph).codes(images)
    entry = graph.tensors[graph.quantize.output]
    assert (np.asarray(codes[entry.name])[1, 2, 3] == entry.zero_point).all()
    assert sum(int(n) for n in model.record(images).nan_counts.values()) == 3


ONE = np.ones((1, 1), np.float32)
TENSOR = g.Tensor(name="x", shape=(2, 3), scale=np.float32(1), zero_point=0)
ARRAYS = {
    "weights": np.full((1, 3), 256, np.int32),
    "bias": np.zeros((2, 1), np.int32),
    "multiplier": np.ones((1, 1), np.float32),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights", np.full((1, 4), 256, np.int32), r"weights has the shape \(1, 4\)"),
        ("bias", np.zeros(3, np.int32), r"bias has the shape \(3,\)"),
        ("bias", np.zeros((2, 3), np.int64), "bias must be int32, got int64"),
        ("bias", np.full((1, 1), 2**31 - 1, np.int32), "its sums may reach"),
        ("multiplier", np.zeros((1, 1), np.float32), "multiplier is not positive"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(field, value, message):
    with pytest.raises(GraphError, match=f"node 'a': {message}"):
        network_of({**ARRAYS, field: value}, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shifts": None}, "has factors and terms without shifts"),
        ({"factors": np.ones((1, 2), np.float32)}, r"factors has the shape \(1, 2\)"),
        ({"terms": np.full((1, 1), np.inf, np.float32)}, "terms must be float32 and finite"),
    ],
)
def test_factors_of_an_input_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(GraphError, match=f"node 'q': {message}"):
        network_of(ARRAYS, {**dict.fromkeys(g.Quantize.COEFFICIENTS, ONE), **fields})


def network_of(arrays, fields):
    """A network that scales its input and puts it through an Affine node."""
    out = g.Tensor(name="y", shape=(2, 3), scale=np.float32(1), zero_point=0)
    quantize = g.Quantize(name="q", inputs=(g.INPUT,), output="x", inverse=np.float32(1), **fields)
    return g.IntegerGraph(
        inputs=(g.Input(shape=(2, 3)),),
        tensors={"x": TENSOR, "y": out},
        nodes=(quantize, g.Affine(name="a", inputs=("x",), output="y", **arrays)),
        outputs=(g.Output(name="y", shape=(2, 3)),),
        requantization="float",
        metadata={},
    )
