"""Layers with an integer product injected by hand, against the transformed model and AQT."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aqt.jax.v2 import utils
from aqt.jax.v2.flax import aqt_flax
from flax import nnx

import jaxqat
from jaxqat.quant.aqt import conv_general_dilated_cls, dot_general_cls, from_aqt, to_aqt

pytestmark = pytest.mark.slow

IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(16, 12)).astype(np.float32)
RECIPES = ["int8", "int8_symmetric", "int8_dynamic", "w4a8"]


class Network(nn.Module):
    """Two convolutions and a dense layer; each reads a tensor of its own."""

    recipe: Any = None  # None injects nothing.

    @nn.compact
    def __call__(self, x):
        conv: Any = {}
        dense: Any = {}
        if self.recipe is not None:
            conv = {"conv_general_dilated_cls": conv_general_dilated_cls(self.recipe)}
            dense = {"dot_general_cls": dot_general_cls(self.recipe)}
        x = nn.relu(nn.Conv(6, (3, 3), name="conv1", **conv)(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv2", **conv)(x))
        return nn.Dense(5, name="head", **dense)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_of_training_gives_the_bits_of_the_transformed_model(recipe):
    """The same checkpoint fits both, and ranges, results and gradients are equal."""
    variables = Network().init(jax.random.key(0), IMAGES)
    variables = jaxqat.quantize(Network(), recipe).init_quant(variables, IMAGES)
    assert jax.tree.structure(variables) == jax.tree.structure(
        {"quant": {}, **Network(recipe).init(jax.random.key(0), IMAGES)}
    )
    models: list[Any] = [Network(recipe), jaxqat.quantize(Network(), recipe)]
    outcomes = []
    for model in models:
        # Compiled as a whole, the two may round float operations between layers differently.
        def loss(params, state, model=model):
            logits, updates = model.apply({"params": params, **state}, IMAGES, mutable=["quant"])
            return jnp.sum(logits**2), (logits, updates)

        state = {name: value for name, value in variables.items() if name != "params"}
        for _ in range(3):
            gradients, (logits, updates) = jax.grad(loss, has_aux=True)(variables["params"], state)
            state = {**state, **updates}
        outcomes.append((logits, gradients, state))
    jax.tree.map(np.testing.assert_array_equal, *outcomes)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(outcomes[0][1]))


def test_a_checkpoint_of_injected_layers_becomes_an_integer_network():
    variables = Network("int8").init(jax.random.key(0), IMAGES)
    for _ in range(2):
        _, updates = Network("int8").apply(variables, IMAGES, mutable=["quant"])
        variables = {**variables, **updates}
    network = jaxqat.quantize(Network()).bind(variables)
    graph = jaxqat.convert(network, IMAGES)
    assert not jaxqat.verify(network, graph=graph, batches=[IMAGES]).failures
    # With frozen ranges the integer network adds biases as integers, at most half a unit of the
    # last layer's sums off: 5 results of magnitude 1 and scale 2**-13 are within 2**-12.
    frozen: Any = Network("int8").apply(variables, IMAGES)
    np.testing.assert_allclose(frozen, network(IMAGES), atol=2**-12)


def test_ranges_move_only_while_they_are_mutable():
    variables = Network("int8").init(jax.random.key(0), IMAGES)
    assert all(int(c["input"]["count"]) == 0 for c in variables["quant"].values())
    updates: Any = Network("int8").apply(variables, IMAGES, mutable=["quant"])[1]
    assert {int(c["input"]["count"]) for c in updates["quant"].values()} == {1}
    assert float(updates["quant"]["conv1"]["input"]["max"]) == IMAGES.max()
    with pytest.raises(jaxqat.QuantizationError, match=r"no range for 'conv1' \(coll"):
        Network("int8").apply({"params": variables["params"]}, IMAGES)


def test_a_frozen_range_without_data_is_refused():
    variables = Network("int8").init(jax.random.key(0), IMAGES)
    with pytest.raises(jaxqat.QuantizationError, match="range of 'conv1' has seen no data"):
        Network("int8").apply(variables, IMAGES)
    module = NNXNetwork("int8")
    module.eval()
    with pytest.raises(jaxqat.QuantizationError, match="has seen no data"):
        module(ROWS)


def test_stochastic_rounding_differs_between_layers():
    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x):
            cls = dot_general_cls(jaxqat.Recipe(rounding="stochastic"))
            ones = nn.initializers.constant(0.3)
            return [
                nn.Dense(7, kernel_init=ones, name=name, dot_general_cls=cls)(x) for name in "ab"
            ]

    # A constant kernel of 7 outputs has the largest code alone, which is exact: add one weight.
    variables: Any = Twins().init(jax.random.key(0), ROWS)
    for name in "ab":
        kernel = variables["params"][name]["kernel"]
        variables["params"][name]["kernel"] = kernel.at[0].set(1.0)
    (a, b), _ = Twins().apply(variables, ROWS, mutable=["quant"])
    assert np.abs(a - b).max() > 0
    with pytest.raises(jaxqat.RecipeError, match="does not know its path, which seeds rounding"):
        jaxqat.aqt.NNXDotGeneral(jaxqat.Recipe(rounding="stochastic"))


def test_rules_match_the_layers_path():
    rules = (
        jaxqat.Rule(path="conv.", weight_bits=None, act_bits=None),
        jaxqat.Rule(kind="dense", weight_bits=2, act_bits=8),
    )
    recipe = jaxqat.Recipe(rules=rules)
    variables = Network(recipe).init(jax.random.key(0), IMAGES)
    assert set(variables["quant"]) == {"head"}
    found, _ = Network(recipe).apply(variables, IMAGES, mutable=["quant"])
    expected, _ = jaxqat.quantize(Network(), recipe).apply(variables, IMAGES, mutable=["quant"])
    np.testing.assert_array_equal(found, expected)


def test_recipes_that_need_the_whole_network_are_refused():
    with pytest.raises(jaxqat.RecipeError, match="takes no learned step sizes"):
        dot_general_cls("w4a4_lsq")
    rule = jaxqat.Rule(kind="dense", act_range="pact")
    with pytest.raises(jaxqat.RecipeError, match="takes no learned step sizes"):
        conv_general_dilated_cls(jaxqat.Recipe(rules=(rule,)))
    with pytest.raises(jaxqat.RecipeError, match="takes no first_last_bits"):
        dot_general_cls(jaxqat.Recipe(weight_bits=4, first_last_bits=8))
    with pytest.raises(jaxqat.RecipeError, match="takes no rules"):
        jaxqat.aqt.NNXDotGeneral(jaxqat.Recipe(rules=(jaxqat.Rule(weight_bits=4),)))


def test_a_model_with_injected_layers_is_not_quantized_twice():
    variables = Network("int8").init(jax.random.key(0), IMAGES)
    with pytest.raises(jaxqat.QuantizationError, match="conv1 is quantized already"):
        jaxqat.quantize(Network("int8")).bind(variables).layers(IMAGES)
    with pytest.raises(jaxqat.QuantizationError, match="first is quantized already"):
        jaxqat.quantize(NNXNetwork("int8")).layers(ROWS)


class NNXNetwork(nnx.Module):
    def __init__(self, recipe=None):
        rngs = nnx.Rngs(0)
        product: Any = {} if recipe is None else {"dot_general": jaxqat.aqt.NNXDotGeneral(recipe)}
        self.first = nnx.Linear(12, 8, rngs=rngs, **product)
        product = {} if recipe is None else {"dot_general": jaxqat.aqt.NNXDotGeneral(recipe)}
        self.head = nnx.Linear(8, 3, rngs=rngs, **product)

    def __call__(self, x):
        return self.head(nnx.relu(self.first(x)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nnx_layers_give_the_bits_of_the_transformed_module(recipe):
    injected, transformed = NNXNetwork(recipe), jaxqat.quantize(NNXNetwork(), recipe)
    layers: Any = {"first": injected.first, "head": injected.head}
    if recipe != "int8_dynamic":  # Their ranges, as the transformed module holds them.
        transformed.quant.set_value(
            {name: {"input": layer.dot_general.quant.get_value()} for name, layer in layers.items()}
        )
    outcomes = []
    for module in (injected, transformed):
        loss = lambda module: jnp.sum(module(ROWS) ** 2)  # noqa: E731
        gradients = nnx.grad(loss)(module)
        outcomes.append((module(ROWS), jax.tree.leaves(gradients)))
    jax.tree.map(np.testing.assert_array_equal, *outcomes)
    if recipe != "int8_dynamic":
        assert int(layers["first"].dot_general.quant.get_value()["count"]) == 2
        injected.eval()
        injected(ROWS)
        assert int(layers["first"].dot_general.quant.get_value()["count"]) == 2


def test_an_nnx_convolution_multiplies_integers():
    product: Any = jaxqat.aqt.NNXConvGeneralDilated("int8")
    conv = nnx.Conv(3, 4, (3, 3), conv_general_dilated=product, rngs=nnx.Rngs(0))
    conv(jnp.asarray(IMAGES))
    conv.eval()  # In training the range moves, which `make_jaxpr` does not allow.
    text = str(jax.make_jaxpr(lambda x: conv(x))(IMAGES))
    assert "preferred_element_type=int32" in text


# AQT's configurations.


def same_as(recipe):
    with pytest.warns(jaxqat.aqt.AqtWarning):
        return from_aqt(to_aqt(recipe))


@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_bits": 4}, {"weight_granularity": "per_tensor"}, {"weight_range": "snr"}],
)
def test_a_dynamic_recipe_becomes_a_configuration_and_a_recipe_again(changes):
    recipe = dataclasses.replace(jaxqat.Recipe.preset("int8_dynamic"), **changes)
    assert same_as(recipe) == recipe
    assert from_aqt(to_aqt(jaxqat.Recipe(weight_bits=None, act_bits=None))).weight_bits is None


def test_fields_without_an_equivalent_in_aqt_are_named():
    dynamic = jaxqat.Recipe.preset("int8_dynamic")
    for recipe, named in (
        (jaxqat.Recipe(), r"activations 'affine' \(AQT's are symmetric\)"),
        (jaxqat.Recipe(activations="symmetric"), "act_range 'ema' without a bound"),
        (dataclasses.replace(dynamic, weight_range="mse"), "weight_range 'mse'"),
        (dataclasses.replace(dynamic, weight_granularity="per_group"), "'per_group'"),
        (dataclasses.replace(dynamic, first_last_bits=8), "rules or first_last_bits"),
        (jaxqat.Recipe(activations="symmetric", rounding="stochastic"), "rounding 'stochastic'"),
        (jaxqat.Recipe(activations="symmetric", act_range="lsq"), r"act_range 'lsq' \(learned\)"),
        (
            jaxqat.Recipe(weight_bits=None, act_bits=None, rules=(jaxqat.Rule(path="a"),)),
            "rules or first_last_bits",
        ),
    ):
        with pytest.raises(jaxqat.RecipeError, match=named):
            to_aqt(recipe)


@pytest.mark.parametrize(
    "bound", [0.0, -1.0, np.inf, np.nan, 1e39, 1e-42, True, "2.0", [1.0, 2.0]], ids=str
)
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(jaxqat.RecipeError, match="a positive number that float32 can hold"):
        to_aqt("int8_symmetric", bound=bound)


def test_a_dynamic_recipe_takes_no_bound():
    with pytest.raises(jaxqat.RecipeError, match=r"act_range 'dynamic' with a bound, 2\.0"):
        to_aqt("int8_dynamic", bound=2.0)
    with pytest.raises(jaxqat.RecipeError, match=r"name of a preset .* got NoneType"):
        to_aqt(None)  # pyright: ignore[reportArgumentType]


def test_a_static_recipe_becomes_a_configuration_with_its_calibrated_bound():
    float_layer: Any = nn.Dense(7, use_bias=False)
    variables = float_layer.init(jax.random.key(0), ROWS)
    # Calibrated on other rows: values of ROWS are clipped.
    quantized = jaxqat.quantize(float_layer, "int8_symmetric")
    model = jaxqat.calibrate(quantized, variables, batches=[ROWS / 2])
    (layer,) = model.variables["quant"].values()
    bound = float(max(-layer["input"]["min"], layer["input"]["max"]))
    product = functools.partial(aqt_flax.AqtDotGeneral, to_aqt("int8_symmetric", bound=bound))
    injected: Any = nn.Dense(7, use_bias=False, dot_general_cls=product)
    found = injected.apply(variables, ROWS, rngs={"params": jax.random.key(1)})
    assert np.abs(found - float_layer.apply(variables, ROWS)).max() > 0.1
    # Codes and sums are ours; the scales are two float32 products, each rounded once more or less.
    np.testing.assert_allclose(found, model(ROWS), rtol=2**-21, atol=0)

    def loss(variables, rows):
        return jnp.sum(injected.apply(variables, rows, rngs={"params": jax.random.key(1)}) ** 2)

    def loss_here(variables, rows):
        return jnp.sum(quantized.apply({**model.variables, **variables}, rows) ** 2)

    found, wanted = (jax.grad(f, (0, 1))(variables, ROWS) for f in (loss, loss_here))
    clipped = np.abs(ROWS) > bound
    np.testing.assert_array_equal(found[1][clipped], 0)
    for gradient, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        size = np.abs(expected).max()
        assert size > 0
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * size)


def test_aqt_trains_converts_and_serves_with_the_configuration_of_a_recipe():
    """AQT's freezer stores the codes of the weights; served, they give the trained result."""

    def layer(mode):
        product = functools.partial(
            aqt_flax.AqtDotGeneral,
            to_aqt("int8_dynamic"),
            rhs_quant_mode=mode,
            rhs_freeze_mode=aqt_flax.FreezerMode.CALIBRATION_AND_VALUE,
        )
        return nn.Dense(7, use_bias=False, dot_general_cls=product)

    key = {"params": jax.random.key(1)}
    trained: Any = layer(utils.QuantMode.TRAIN)
    variables = trained.init(jax.random.key(0), ROWS)
    gradient = jax.grad(lambda v: jnp.sum(trained.apply(v, ROWS, rngs=key) ** 2))(variables)
    assert np.abs(gradient["params"]["kernel"]).max() > 0
    wanted = trained.apply(variables, ROWS, rngs=key)
    _, frozen = layer(utils.QuantMode.CONVERT).apply(variables, ROWS, rngs=key, mutable=["aqt"])
    codes = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.int8]
    assert [c.size for c in codes] == [12 * 7]
    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    served = layer(utils.QuantMode.SERVE).apply({"params": zeros, **frozen}, ROWS, rngs=key)
    np.testing.assert_array_equal(served, wanted)
    # Codes and sums are ours; AQT scales the sums twice, which rounds once more.
    ours = jaxqat.quantize(nn.Dense(7, use_bias=False), "int8_dynamic").bind(variables)(ROWS)
    np.testing.assert_allclose(ours, wanted, rtol=2**-22, atol=0)
