"""Dynamic ranges, embeddings, attention products, transposed convolutions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqat
from jaxqat import Recipe, RecipeError, Rule

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(6, 12)).astype(np.float32) * np.logspace(-2, 2, 6)[:, None]
ROWS = ROWS.astype(np.float32)
IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)
WEIGHTS = RNG.normal(size=(12, 5)).astype(np.float32)


def codes(x, axes, bits=8):
    """Symmetric codes and scales in float64, as the recipes have them."""
    top = 2 ** (bits - 1) - 1
    scale = np.abs(x.astype(np.float64)).max(axis=axes, keepdims=True) / top
    return np.round(x / scale), scale


def test_a_dynamic_range_is_that_of_each_row_and_needs_no_calibration():
    model = jaxqat.quantize(lambda w, x: x @ w, "int8_dynamic")
    assert model.init_quant({"params": WEIGHTS}, ROWS)["quant"] == {}
    q, s = codes(ROWS, (1,))
    k, t = codes(WEIGHTS, (0,))
    # Three float32 roundings of the result.
    found = model.apply({"params": WEIGHTS}, ROWS)
    np.testing.assert_allclose(found, (q @ k) * s * t, rtol=4 * 2**-24)


def test_a_row_of_a_dynamic_network_does_not_depend_on_the_other_rows():
    model = jaxqat.quantize(lambda w, x: x @ w, "int8_dynamic")
    network = model.bind({"params": WEIGHTS})
    # The sums of codes are equal. Compiled for another batch size, their two products with scales
    # can be taken in another order, of two roundings each.
    np.testing.assert_allclose(network(ROWS)[2:3], network(ROWS[2:3]), rtol=4 * 2**-24)


def test_a_dynamic_convolution_has_a_range_for_each_image():
    w = RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)

    def conv(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = IMAGES * np.asarray([1, 100], np.float32)[:, None, None, None]
    model = jaxqat.quantize(conv, "int8_dynamic")
    q, s = codes(x, (1, 2, 3))
    k, t = codes(w, (0, 1, 2))
    expected = np.asarray(conv(k.astype(np.float32), q.astype(np.float32)), np.float64) * s * t
    found = model.apply({"params": w}, x)
    np.testing.assert_allclose(found, expected, rtol=4 * 2**-24, atol=1e-30)


def test_a_dynamic_network_trains_and_a_strict_conversion_refuses_it_with_the_reason():
    model = jaxqat.quantize(lambda w, x: x @ w, "int8_dynamic")
    gradient = jax.grad(lambda w: jnp.sum(model.apply({"params": w}, ROWS)))(WEIGHTS)
    q, s = codes(ROWS, (1,))
    np.testing.assert_allclose(gradient, np.tile((q * s).sum(0)[:, None], 5), rtol=2**-18)
    with pytest.raises(jaxqat.ConversionError, match="dynamic range of the input of parameters"):
        jaxqat.convert(model, {"params": WEIGHTS}, ROWS[:1], strict=True)


def test_dynamic_ranges_without_a_symmetric_grid_are_refused():
    with pytest.raises(RecipeError, match=r"'dynamic' needs quant.activations"):
        Recipe(act_range="dynamic")
    with pytest.raises(RecipeError, match=r"rule path='a'.*'dynamic' needs"):
        Recipe(rules=(Rule(path="a", act_range="dynamic"),))


def test_modules_with_dynamic_ranges_alone_need_no_calibration():
    dense = nn.Dense(5)
    variables: Any = dense.init(jax.random.key(0), ROWS)
    model = jaxqat.quantize(dense, "int8_dynamic")
    expected = model.apply({**variables, "quant": {}}, ROWS)
    module = nnx.Linear(12, 5, rngs=nnx.Rngs(0))
    module.kernel.set_value(variables["params"]["kernel"])
    np.testing.assert_array_equal(jaxqat.quantize(module, "int8_dynamic")(ROWS), expected)


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(3, name="head")(nn.Embed(10, 8, name="words")(tokens))


TOKENS = RNG.integers(0, 10, size=(4, 6))


def test_an_embedding_is_codes_and_one_scale_a_row():
    network = jaxqat.calibrate(Tagger(), Tagger().init(jax.random.key(0), TOKENS), batches=[TOKENS])
    table = network.layers(TOKENS)
    assert [(row.path, row.kind, row.weight_bits) for row in table] == [
        ("words", "embed", 8),
        ("head", "dense", 8),
    ]
    weights = np.asarray(network.variables["params"]["words"]["embedding"])
    q, s = codes(weights, (1,))
    seen = network.observe(TOKENS)  # Calibration is in float.
    np.testing.assert_array_equal(seen.observed["head", "input"], weights[TOKENS])
    form: Any = network.record(TOKENS).forms["head", "input"]
    np.testing.assert_allclose(form.values, (q * s)[TOKENS], rtol=2 * 2**-23)


def test_an_embedding_gets_gradients_of_the_rows_that_were_looked_up():
    module = Tagger()
    variables = module.init(jax.random.key(0), TOKENS)
    network = jaxqat.calibrate(module, variables, batches=[TOKENS])
    tokens = TOKENS % 5

    def loss(params):
        return jnp.sum(network.with_variables(params=params)(tokens) ** 2)

    gradient = jax.grad(loss)(variables["params"])["words"]["embedding"]
    used = np.isin(np.arange(10), tokens)
    assert (np.abs(gradient).sum(1) > 0).tolist() == used.tolist()


def test_a_rule_leaves_an_embedding_in_float():
    rules = (Rule(kind="embed", weight_bits=None, act_bits=None),)
    model = jaxqat.quantize(Tagger(), Recipe(rules=rules))
    row = model.layers(Tagger().init(jax.random.key(0), TOKENS), TOKENS)[0]
    assert (row.kind, row.weight_bits) == ("embed", None)
    assert row.float_reason == "the recipe leaves it in float"


def scores(params, x):
    return jnp.einsum("bqd,bkd->bqk", x @ params["q"], x @ params["k"])


def test_an_embedding_in_front_is_the_first_layer_and_has_no_groups():
    variables = Tagger().init(jax.random.key(0), TOKENS)
    table = jaxqat.quantize(Tagger(), "w2a2_lsq").layers(variables, TOKENS)
    assert [(row.kind, row.weight_bits) for row in table] == [("embed", 8), ("dense", 8)]
    groups = Recipe(weight_granularity="per_group", group_size=4)
    with pytest.raises(RecipeError, match="words is a table of embeddings"):
        jaxqat.quantize(Tagger(), groups).layers(variables, TOKENS)


SEQUENCES = RNG.normal(size=(2, 5, 12)).astype(np.float32)
HEADS = {name: RNG.normal(size=(12, 4)).astype(np.float32) for name in "qk"}


def test_attention_products_stay_in_float_unless_a_rule_says_otherwise():
    row = jaxqat.quantize(scores).layers({"params": HEADS}, SEQUENCES)[2]
    assert (row.weight_bits, row.float_reason) == (None, "both operands depend on the data")
    recipe = Recipe(rules=(Rule(kind="attention"),))
    row = jaxqat.quantize(scores, recipe).layers({"params": HEADS}, SEQUENCES)[2]
    assert (row.kind, row.weight_bits, row.act_bits) == ("attention", 8, 8)


def test_an_attention_product_is_left_in_float_by_a_rule_before_that_for_all():
    rules = (
        Rule(kind="attention", path=".*bqk.*", weight_bits=None, act_bits=None),
        Rule(kind="attention"),
    )

    def both(params, x):
        return scores(params, x) @ x

    table = jaxqat.quantize(both, Recipe(rules=rules)).layers({"params": HEADS}, SEQUENCES)
    found = [(r.kind, r.weight_bits, r.float_reason) for r in table[2:]]
    left = "the recipe leaves it in float"
    assert found == [("attention", None, left), ("attention", 8, None)]


@pytest.mark.parametrize("activations", ["affine", "symmetric"])
def test_an_attention_product_multiplies_the_codes_of_both_sides(activations):
    recipe = Recipe(activations=activations, rules=(Rule(kind="attention"),))
    network = jaxqat.calibrate(scores, {"params": HEADS}, batches=[SEQUENCES], recipe=recipe)
    record = network.record(SEQUENCES)
    left, right = (
        next(t for key, t in record.codes.items() if key[-1] == side) for side in ("left", "right")
    )
    real = [
        (np.asarray(t.codes, np.int64) - int(t.grid.zero_point or 0), float(t.grid.scale))
        for t in (left, right)
    ]
    (q, s), (k, t) = real
    expected = np.einsum("bqd,bkd->bqk", q, k) * (np.float32(s) * np.float32(t))
    # One rounding of the scales' product and one of the result.
    np.testing.assert_allclose(record.results[0], expected, rtol=4 * 2**-24)


def test_gradients_reach_both_sides_of_an_attention_product():
    recipe = Recipe(rules=(Rule(kind="attention"),))
    network = jaxqat.calibrate(scores, {"params": HEADS}, batches=[SEQUENCES], recipe=recipe)
    found = jax.grad(lambda p: jnp.sum(network.with_variables(params=p)(SEQUENCES) ** 2))(HEADS)
    exact = jax.grad(lambda p: jnp.sum(scores(p, SEQUENCES) ** 2))(HEADS)
    for name in "qk":
        cosine = np.vdot(found[name], exact[name]) / np.linalg.norm(found[name])
        assert cosine > 0.99 * np.linalg.norm(exact[name])  # Behind three products of 8 bits.


class Upsample(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.ConvTranspose(4, (3, 3), strides=(2, 2), name="up")(x)


def test_a_transposed_convolution_multiplies_integers_as_its_integer_network_does():
    module = Upsample()
    variables = module.init(jax.random.key(0), IMAGES)
    network = jaxqat.calibrate(module, variables, batches=[IMAGES])
    found: Any = network(IMAGES)
    exact: Any = module.apply(variables, IMAGES)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02  # Of 8 bits; a wrong border or zero point would show.
    graph = jaxqat.convert(network, IMAGES[:1], strict=True)
    check = jaxqat.verify(network, graph=graph, batches=[IMAGES])
    assert (check.differing, check.failures) == (0, ())


VOLUMES = RNG.normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
# The module, its input, and whether all of it has an integer form.
OTHER_AXES = {
    "1-D, dilated": (nn.Conv(4, (3,), strides=2, kernel_dilation=2), SEQUENCES, True),
    "3-D, grouped": (nn.Conv(6, (3, 3, 3), feature_group_count=3), VOLUMES, True),
    "einsum": (nn.Einsum((12, 7), "abc,cd->abd"), SEQUENCES, True),
    # The last product has two axes of channels; a network's real result has one.
    "general": (nn.DenseGeneral((2, 4), axis=(-2, -1)), SEQUENCES, False),
}


@pytest.mark.parametrize("name", OTHER_AXES)
def test_products_over_other_axes_multiply_integers(name):
    module, x, convertible = OTHER_AXES[name]
    variables = module.init(jax.random.key(0), x)
    network = jaxqat.calibrate(module, variables, batches=[x])
    assert [(r.weight_bits, r.act_bits) for r in network.layers(x)] == [(8, 8)]
    found: Any = network(x)
    exact: Any = module.apply({"params": variables["params"]}, x)
    assert 0 < np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)  # Of 8 bits.
    if not convertible:
        with pytest.raises(jaxqat.ConversionError, match="has several axes of channels"):
            jaxqat.convert(network, x[:1], strict=True)
    graph = jaxqat.convert(network, x[:1])
    assert jaxqat.verify(network, graph=graph, batches=[x]).differing == 0


def test_a_quantized_function_can_be_mapped():
    network = jaxqat.calibrate(lambda w, x: x @ w, {"params": WEIGHTS}, batches=[ROWS])
    stacked = np.stack([WEIGHTS, 2 * WEIGHTS])
    found = jax.vmap(lambda w: network.with_variables(params=w)(ROWS))(stacked)
    for w, each in zip(stacked, found, strict=True):
        np.testing.assert_array_equal(each, network.with_variables(params=w)(ROWS))
