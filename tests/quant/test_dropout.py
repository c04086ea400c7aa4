"""Dropout acts on codes: the tensor before it is quantized, in training as in inference."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from plain import others_long
from references.sqnr import decibels

import jaxqat
from jaxqat.quant import _forms as forms

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
ROWS = RNG.normal(0.3, 1, size=(64, 12)).astype(np.float32)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
TOKENS = ROWS.reshape(8, 16, 6)
KEY = jax.random.key(3)
PARAMS = {
    name: {"kernel": RNG.normal(0, 0.4, shape).astype(np.float32)}
    for name, shape in {"stem": (12, 16), "head": (16, 5)}.items()
}


class Linen(nn.Module):
    rate: float = 0.5
    broadcast_dims: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(16, use_bias=False, name="stem")(x))
        x = nn.Dropout(self.rate, self.broadcast_dims, deterministic=not train)(x)
        return nn.Dense(5, use_bias=False, name="head")(x)


class NNX(nnx.Module):
    def __init__(self):
        self.stem = nnx.Linear(12, 16, use_bias=False, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.head = nnx.Linear(16, 5, use_bias=False, rngs=nnx.Rngs(2))
        self.stem.kernel[...] = jnp.asarray(PARAMS["stem"]["kernel"])

    def __call__(self, x, train):
        x = nnx.relu(self.stem(x))
        return self.head(self.dropout(x, deterministic=not train))


def functional(params, x, mask, train):
    """With the mask as an input, and the other order of the selection."""
    x = jax.nn.relu(x @ params["stem"]["kernel"])
    x = jnp.where(jnp.logical_not(mask), 0.0, x * 2.0) if train else x
    return x @ params["head"]["kernel"]


def equinox(params, x, train):
    x = jax.nn.relu(x @ params["stem"]["kernel"])
    if train:
        drop = lambda x, key: eqx.nn.Dropout(0.5)(x, key=key)  # noqa: E731
        x = jax.vmap(drop)(x, jax.random.split(KEY, len(x)))
    return x @ params["head"]["kernel"]


MASK = RNG.random((64, 16)) < 0.5


def of_linen(*args: Any, **kwargs: Any) -> Any:
    return lambda train: (
        jaxqat.quantize(Linen(*args, **kwargs)).bind(
            {"params": PARAMS}, train=train, rngs={"dropout": KEY}
        ),
        (ROWS,),
    )


def of_function(function: Any, *inputs: Any) -> Any:
    return lambda train: (
        jaxqat.quantize(function).bind({"params": PARAMS}, train=train),
        (ROWS, *inputs),
    )


# A bound model without ranges in one mode, and its inputs.
KINDS: dict[str, Any] = {
    "linen": of_linen(),
    "linen, rate 0.1": of_linen(0.1),
    "linen, one mask for all examples": of_linen(0.5, (0,)),
    "nnx": lambda train: (jaxqat.quantize(NNX()).bind(train=train), (ROWS,)),
    "function": of_function(functional, MASK),
    "equinox": of_function(equinox),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_range_in_training_is_that_of_the_tensor_before_dropout(kind):
    states = []
    for train in (False, True):
        network, inputs = KINDS[kind](train)
        states.append(network.calibrate(*inputs).variables["quant"])
    jax.tree.map(np.testing.assert_array_equal, *states)
    before = np.asarray(jax.nn.relu(jnp.asarray(ROWS) @ PARAMS["stem"]["kernel"]))
    found = states[1]["head"]["input"]
    np.testing.assert_array_equal([found["min"], found["max"]], [before.min(), before.max()])


def test_the_layer_multiplies_codes_of_which_the_dropped_are_the_zero_point():
    network, inputs = KINDS["function"](True)
    record = network.calibrate(*inputs).record(*inputs)
    before, accumulator = record.codes["head", "input"], record.outputs[0].form
    assert isinstance(accumulator, forms.Accumulator)
    assert isinstance(accumulator.source, forms.Multiplied)
    zero = int(before.grid.zero)
    codes = np.where(MASK, before.codes, zero)
    np.testing.assert_array_equal(accumulator.source.codes.codes, codes)
    weights = np.asarray(accumulator.source.weight_codes, np.int64)
    total = (codes.astype(np.int64) - zero) @ weights
    np.testing.assert_array_equal(accumulator.total + accumulator.correction, total)
    np.testing.assert_array_equal(accumulator.input_scale, before.grid.scale * 2)
    scales = np.float64(before.grid.scale) * 2 * np.asarray(accumulator.weight_scale, np.float64)
    # An exact int32 sum, as float32, times the product of two float32 scales: three roundings.
    np.testing.assert_allclose(record.results[0], total * scales, rtol=3 * 2**-24)


def test_gradients_are_those_of_dropout_on_dequantized_values():
    network, inputs = KINDS["function"](True)
    network = network.calibrate(*inputs)
    record = network.record(*inputs)
    cotangent = RNG.normal(size=(64, 5)).astype(np.float32)

    def loss(params):
        return jnp.sum(network.with_variables(params=params)(*inputs) * cotangent)

    gradients = jax.tree.map(np.float64, jax.grad(loss)(PARAMS))
    source, x = record.outputs[0].form.source, record.codes["stem", "input"]
    head = np.float64(source.weight_codes) * np.float64(record.outputs[0].form.weight_scale)
    codes = record.codes["head", "input"]
    units = np.float64(codes.codes) - np.float64(codes.grid.zero)
    dropped = units * np.float64(codes.grid.scale) * MASK * 2
    rows = (np.float64(x.codes) - np.float64(x.grid.zero)) * np.float64(x.grid.scale)
    back = (cotangent @ head.T) * MASK * 2 * (record_positive(record) > 0)
    for name, expected in {"head": dropped.T @ cotangent, "stem": rows.T @ back}.items():
        # Sums of 64 products of float32 numbers, which are products of scale and code: each has
        # at most 64 + 8 roundings of its terms' magnitude.
        size = np.abs(dropped if name == "head" else rows).T @ np.abs(
            cotangent if name == "head" else back
        )
        error = np.abs(gradients[name]["kernel"] - expected)
        assert (error <= 72 * 2**-24 * size).all(), name
    assert np.abs(gradients["stem"]["kernel"]).max() > 1


def record_positive(record):
    """The float result of the first layer, whose sign decides about ReLU's gradient."""
    (layer,) = (x for x in record.layers.values() if x.layer.path == "stem")
    return np.asarray(layer.result)


class Wired(nn.Module):
    """Dropout at the places where networks have it."""

    place: str

    @nn.compact
    def __call__(self, x, train):
        def drop(x):
            return nn.Dropout(0.5, deterministic=not train)(x)

        def dense(x, name):
            return nn.Dense(8, name=name)(x)

        x = dense(x, "stem")
        if self.place == "of a branch":
            x = x + drop(dense(nn.relu(x), "branch"))
        elif self.place == "of a sum":
            x = drop(x + dense(nn.relu(x), "branch"))
        elif self.place == "before ReLU":
            x = nn.relu(drop(x + dense(nn.relu(x), "branch")))
        elif self.place == "before a maximum":
            x = nn.max_pool(drop(nn.relu(x)), (2, 2), (2, 2))
        elif self.place == "before an average":
            x = drop(nn.relu(x)).mean((1, 2))
        elif self.place == "twice, and reshaped":
            x = drop(drop(nn.relu(x)).reshape(len(x), -1))
        return dense(x, "head")


PLACES = (
    "of a branch",
    "of a sum",
    "before ReLU",
    "before a maximum",
    "before an average",
    "twice, and reshaped",
)


@pytest.mark.parametrize("place", PLACES)
def test_both_modes_have_the_same_ranges_wherever_dropout_stands(place):
    module, keys = Wired(place), {"params": KEY, "dropout": KEY}
    variables = module.init(keys, IMAGES, train=False)
    model = jaxqat.quantize(module)
    sets = [
        set(flatten_dict(model.init_quant(variables, IMAGES, train=train, rngs=keys)["quant"]))
        for train in (False, True)
    ]
    assert sets[0] == sets[1]
    variables = model.calibrate(variables, IMAGES, train=True, rngs=keys)
    _, updates = model.apply(variables, IMAGES, train=True, rngs=keys, mutable=["quant"])
    assert np.isfinite(model.apply({**variables, **updates}, IMAGES, train=False)).all()


def largest_of_two(x):
    return nn.max_pool(x[..., None], (2,), (2,))[..., 0]


# What stands between dropout and the layer, and by how much its range may grow in training.
BEHIND = {
    "relu": (jax.nn.relu, 1),
    "maximum with 0": (lambda x: jnp.maximum(x, 0), 1),
    "max-pool and relu": (lambda x: jax.nn.relu(largest_of_two(x)), 1),
    "relu6": (jax.nn.relu6, 2),  # Not a multiple of what it would be without dropout.
    "a minimum of 1": (lambda x: jnp.maximum(x, 1), 2),
}


@pytest.mark.parametrize("act_range", ["minmax", "lsq", "pact"])
@pytest.mark.parametrize("behind", BEHIND)
def test_a_range_behind_dropout_and_a_relu_is_that_of_inference(behind, act_range):
    function, factor = BEHIND[behind]

    def network(params, x, mask, train):
        x = x @ params["stem"]["kernel"]
        x = function(jnp.where(mask, x * 2.0, 0.0) if train else x)
        return x @ params["head"]["kernel"][: x.shape[1]]

    model = jaxqat.quantize(network, jaxqat.Recipe(act_range=act_range))
    x = jnp.asarray(ROWS) @ PARAMS["stem"]["kernel"]
    kept = function(jnp.where(MASK, x, 0))
    behind_dropout = function(jnp.where(MASK, 2 * x, 0))
    bound = model.bind({"params": PARAMS}, train=True).calibrate(ROWS, MASK)
    found = bound.state["head", "input"]
    expected = kept if factor == 1 else behind_dropout
    np.testing.assert_array_equal([found["min"], found["max"]], [expected.min(), expected.max()])
    # The grid of training covers the multiplied values.
    grid = bound.record(ROWS, MASK).codes["head", "input"].grid
    covered = np.float32(grid.scale) * (grid.high - np.asarray(grid.zero))
    if act_range != "lsq":  # Its first step size depends on the mean, not on the largest value.
        np.testing.assert_allclose(covered, behind_dropout.max(), rtol=1e-2)
    without = model.bind(bound.variables, train=False).record(ROWS, MASK)
    scale = without.codes["head", "input"].grid.scale
    np.testing.assert_array_equal(grid.scale, scale * (2 if factor == 1 else 1))


@pytest.mark.parametrize(
    "relu", [jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.clip(x, 0)],
    ids=["relu", "maximum", "clip"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_relu_behind_dropout_is_found_in_every_type(dtype, relu):
    def network(params, x, mask):
        x = x.astype(dtype) @ params["stem"]["kernel"].astype(dtype)
        x = relu(jnp.where(mask, x * 2.0, 0.0))
        return x @ params["head"]["kernel"].astype(dtype)

    model = jaxqat.quantize(network, jaxqat.Recipe(act_range="minmax"))
    bound = model.bind({"params": PARAMS}).calibrate(ROWS, MASK)
    largest = bound.observe(ROWS, MASK).observed["head", "input"].max()
    assert bound.state["head", "input"]["max"] == np.float32(largest) / 2


class Attention(nn.Module):
    """Flax drops attention weights by a product with a mask of 0 and 1 / (1 - p)."""

    broadcast_dropout: bool = True

    @nn.compact
    def __call__(self, x, train):
        attention = nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.5, broadcast_dropout=self.broadcast_dropout, deterministic=not train
        )
        return attention(x)


class NNXAttention(nnx.Module):
    def __init__(self):
        self.attention = nnx.MultiHeadAttention(
            2, in_features=6, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0)
        )

    def __call__(self, x, train):
        return self.attention(x, deterministic=not train)


def attention_networks(kind):
    """The network in inference and in training mode, calibrated in that mode."""
    recipe = jaxqat.Recipe(rules=(jaxqat.Rule(kind="attention"),))
    for train in (False, True):
        if kind == "nnx":
            network = jaxqat.quantize(NNXAttention(), recipe).bind(train=train)
        else:
            module = Attention(broadcast_dropout=kind == "linen")
            variables = module.init({"params": KEY}, TOKENS, train=False)
            model = jaxqat.quantize(module, recipe)
            network = model.bind(variables, train=train, rngs={"dropout": KEY})
        yield network.calibrate(TOKENS)


@pytest.mark.parametrize(
    "kind", others_long(["linen", "linen, each weight", "nnx"], ["linen", "nnx"])
)
def test_attention_drops_codes_of_its_weights(kind):
    inference, training = attention_networks(kind)
    assert inference.state.keys() == training.state.keys()
    for key, state in inference.state.items():
        if key[-2:] != ("out", "input"):  # All but that is before the dropped weights.
            assert jax.tree.all(jax.tree.map(jnp.array_equal, state, training.state[key])), key
    quality = [decibels(n.observe(TOKENS).results[0], n(TOKENS)) for n in (inference, training)]
    # Codes of another grid than the weights' would cost far more than a bit, 6 dB.
    assert quality[1] > quality[0] - 6


def test_dropout_in_calibration_costs_no_accuracy_of_the_logits():
    x = jax.nn.relu(ROWS @ PARAMS["stem"]["kernel"]) @ PARAMS["head"]["kernel"]
    found = []
    for train in (False, True):
        network, inputs = KINDS["linen"](train)
        found.append(decibels(x, network.calibrate(*inputs).bind(train=False)(*inputs)))
    # Half a dB is a tenth of the 6 dB that one bit of the codes is worth.
    assert abs(found[0] - found[1]) < 0.5


def test_a_network_that_trained_with_dropout_is_converted_without_a_differing_code():
    model = jaxqat.quantize(Linen())
    variables = model.calibrate({"params": PARAMS}, ROWS, train=True, rngs={"dropout": KEY})
    for step in range(3):
        _, updates = model.apply(
            variables, ROWS, train=True, rngs={"dropout": jax.random.key(step)}, mutable=["quant"]
        )
        variables = {**variables, **updates}
    network = model.bind(variables, train=False)
    graph = jaxqat.convert(network, ROWS[:1])
    assert jaxqat.verify(network, graph=graph, batches=[ROWS]).differing == 0


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_a_network_in_training_mode_is_not_converted_and_told_why(kind):
    network, inputs = KINDS[kind](True)
    with pytest.raises(jaxqat.ConversionError, match=r"drops elements at random: convert it as in"):
        jaxqat.convert(network.calibrate(*inputs), ROWS[:1])
