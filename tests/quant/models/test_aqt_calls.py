"""Models that inject AQT themselves are quantized as AQT was told to, and as any other."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from aqt.jax.v2 import config, utils
from aqt.jax.v2.flax import aqt_flax
from aqt.jax.v2.numerics import utils as numerics
from flax import nnx

import jaxqat
from jaxqat.quant._aqt import AqtWarning

ROWS = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("ignore::jaxqat.quant._aqt.AqtWarning")


def forward(bits=8) -> Any:
    """A configuration with float gradients, whose last code is the largest magnitude."""
    made: Any = config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)
    for side in (made.fwd.dg_quantizer.lhs, made.fwd.dg_quantizer.rhs):
        side.numerics = numerics.get_numerics(bits, preserve_max_val=True)
    return made


def injected(bits=8, **options):
    return functools.partial(aqt_flax.AqtDotGeneral, forward(bits), **options)


class Perceptron(nn.Module):
    """One layer with a class of AQT's, one with a configuration in place of it, one without."""

    injects: bool = True

    @nn.compact
    def __call__(self, x):
        first: Any = {"dot_general_cls": injected(4)} if self.injects else {}
        second = {"dot_general": forward()} if self.injects else {}
        x = nn.relu(nn.Dense(10, name="first", **first)(x))
        x = nn.relu(nn.Dense(8, name="second", **second)(x))
        return nn.Dense(5, name="head")(x)


PLAIN = {"params": Perceptron(injects=False).init(jax.random.key(0), ROWS)["params"]}
SAME = jaxqat.Recipe(
    rules=tuple(
        jaxqat.Rule(
            path=path, weight_bits=bits, act_bits=bits, activations="symmetric", act_range="dynamic"
        )
        for path, bits in (("first", 4), ("second", 8))
    )
)


def test_a_layers_configuration_is_a_rule_for_its_path():
    network, expected = (
        jaxqat.calibrate(module, PLAIN, batches=[ROWS], recipe=recipe)
        for module, recipe in ((Perceptron(), "int8"), (Perceptron(injects=False), SAME))
    )
    table = [(row.path, row.weight_bits, row.act_bits) for row in network.layers(ROWS)]
    assert table == [("first", 4, 4), ("second", 8, 8), ("head", 8, 8)]
    assert network.layers(ROWS) == expected.layers(ROWS)
    np.testing.assert_array_equal(network(ROWS), expected(ROWS))


def test_a_layer_computes_what_aqt_does():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, use_bias=False, name="only", dot_general_cls=injected())(x)

    variables = Layer().init(jax.random.key(0), ROWS)
    wanted: Any = Layer().apply(variables, ROWS, rngs={"params": jax.random.key(1)})
    found = jaxqat.quantize(Layer()).bind(variables)(ROWS)
    # Codes and sums are equal; AQT scales the sums twice, which rounds once more.
    np.testing.assert_allclose(found, wanted, rtol=2**-22, atol=0)


def test_rules_of_the_recipe_come_before_those_of_aqt():
    recipe = jaxqat.Recipe(rules=(jaxqat.Rule(path="first", weight_bits=3, act_bits=8),))
    rows = jaxqat.quantize(Perceptron(), recipe).bind(PLAIN).layers(ROWS)
    assert [row.weight_bits for row in rows] == [3, 8, 8]


def test_the_warning_names_the_layer_and_the_difference():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="only", dot_general=config.config_v4(dlhs_bits=None))(x)

    variables = jaxqat.quantize(nn.Dense(6)).init(jax.random.key(0), ROWS)["params"]
    with pytest.warns(AqtWarning, match=r"^only: Differences .*divided by 127, not by 127\.5"):
        jaxqat.quantize(Layer()).bind({"params": {"only": variables}}).layers(ROWS)


class Example(nn.Module):
    """The kind of network in AQT's own example: convolutions, dense layers and an einsum."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(16, name="dense", dot_general_cls=injected())(x))
        return Logits(name="logits")(x)


class Logits(nn.Module):
    @nn.compact
    def __call__(self, x):
        weights = self.param("weights", nn.initializers.lecun_normal(), (16, 5))
        return aqt_flax.AqtEinsum(forward())("bi,io->bo", x, weights)


@pytest.mark.slow
def test_aqts_example_trains():
    model = jaxqat.quantize(Example())
    variables = model.init(jax.random.key(0), IMAGES)
    rows = model.layers({"params": variables["params"]}, IMAGES)
    assert [(row.path, row.kind, row.weight_bits) for row in rows] == [
        ("conv", "conv", 8),
        ("dense", "dense", 8),
        ("logits", "dense", 8),
    ]
    variables = model.calibrate({"params": variables["params"]}, IMAGES)
    labels = np.arange(4)

    @jax.jit
    def step(variables):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, IMAGES, mutable=["quant"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
        return {**variables, "params": params, **updates}, value, gradients

    losses = []
    for _ in range(20):
        variables, value, gradients = step(variables)
        losses.append(float(value))
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    assert losses[-1] < losses[0] / 2  # Four images are learned by heart.


def test_an_injected_convolution_is_quantized_like_any_other():
    raw = forward()
    cls = functools.partial(aqt_flax.AqtConvGeneralDilated, raw)

    class Convolution(nn.Module):
        injects: bool

        @nn.compact
        def __call__(self, x):
            options: Any = {"conv_general_dilated_cls": cls} if self.injects else {}
            return nn.Conv(6, (3, 3), name="conv", **options)(x)

    params = {"params": Convolution(False).init(jax.random.key(0), IMAGES)["params"]}
    found = jaxqat.quantize(Convolution(True)).bind(params)
    expected = jaxqat.quantize(Convolution(False), "int8_dynamic").bind(params)
    np.testing.assert_array_equal(found(IMAGES), expected(IMAGES))


def test_an_nnx_layer_with_a_configuration_is_quantized_by_it():
    class Net(nnx.Module):
        def __init__(self, injects):
            product = {"dot_general": forward(4)} if injects else {}
            self.first = nnx.Linear(12, 8, rngs=nnx.Rngs(0), **product)
            self.head = nnx.Linear(8, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(nnx.relu(self.first(x)))

    model = jaxqat.quantize(Net(True))
    model.calibrate(ROWS)
    assert [(r.path, r.weight_bits) for r in model.layers(ROWS)] == [("first", 4), ("head", 8)]
    recipe = jaxqat.Recipe(rules=SAME.rules[:1])
    expected = jaxqat.quantize(Net(False), recipe)
    expected.calibrate(ROWS)
    np.testing.assert_array_equal(model(ROWS), expected(ROWS))
    # The module that was given is as it was.
    given: Any = model.module
    assert given.first.dot_general is not jax.lax.dot_general


def test_what_cannot_be_taken_over_is_refused_by_path():
    def model(**options):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(6, name="only", **options)(x)

        params = {"params": {"only": nn.Dense(6).init(jax.random.key(0), ROWS)["params"]}}
        return jaxqat.quantize(Layer()).bind(params)

    with pytest.raises(jaxqat.RecipeError, match=r"^only: .*dlhs with quantized gradients"):
        model(dot_general=config.config_v4()).layers(ROWS)
    serving = injected(rhs_quant_mode=utils.QuantMode.SERVE)
    with pytest.raises(jaxqat.QuantizationError, match=r"^only is in AQT's mode SERVE"):
        model(dot_general_cls=serving).layers(ROWS)
    tiled = injected(tiling_fn=lambda *_: None)
    with pytest.raises(jaxqat.QuantizationError, match=r"^only multiplies by AQT in tiles"):
        model(dot_general_cls=tiled).layers(ROWS)


def test_two_configurations_at_one_path_are_refused():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            weights: Any = [self.param(n, nn.initializers.normal(), (12, 12)) for n in "ab"]
            first: Any = aqt_flax.AqtEinsum(forward(4))("bi,io->bo", x, weights[0])
            return aqt_flax.AqtEinsum(forward(8))("bi,io->bo", first, weights[1])

    params = {"params": {"a": jnp.eye(12), "b": jnp.eye(12)}}
    with pytest.raises(jaxqat.RecipeError, match="multiplies by two different AQT configurations"):
        jaxqat.quantize(Two()).bind(params).layers(ROWS)
