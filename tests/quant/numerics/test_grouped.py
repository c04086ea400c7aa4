"""Weights with a scale for each group of inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat
from jaxqat import Recipe, RecipeError, Rule

RNG = np.random.default_rng(0)
# Groups of very different magnitudes, so that a scale of their own shows.
WEIGHTS = (RNG.normal(size=(12, 5)) * np.repeat([1, 30, 0.01], 4)[:, None]).astype(np.float32)
ROWS = RNG.normal(size=(6, 12)).astype(np.float32)
IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)


def recipe(**changes):
    return Recipe(**{"weight_granularity": "per_group", "group_size": 4, **changes})


def product(settings):
    """`ROWS` times `WEIGHTS`, calibrated."""
    return jaxqat.calibrate(
        lambda w, x: x @ w, {"params": WEIGHTS}, batches=[ROWS], recipe=settings
    )


def group_codes(w, bits=8):
    """Codes and scales, (3, 4, 5) and (3, 1, 5), in float64."""
    split, top = w.astype(np.float64).reshape(3, 4, 5), 2 ** (bits - 1) - 1
    scale = np.abs(split).max(1, keepdims=True) / top
    return np.round(split / scale), scale


@pytest.mark.parametrize("activations", ["affine", "symmetric"])
@pytest.mark.parametrize("bits", [3, 8])
def test_each_group_has_its_own_scale_and_the_groups_sums_are_added(activations, bits):
    settings = recipe(activations=activations, weight_bits=bits)
    network = product(settings)
    codes = next(iter(network.record(ROWS).codes.values()))
    q = np.asarray(codes.codes, np.float64) - float(codes.grid.zero)
    k, scale = group_codes(WEIGHTS, bits)
    sums = np.einsum("ngi,gio->gno", q.reshape(6, 3, 4), k)
    expected = (sums * scale * float(codes.grid.scale)).sum(0)
    # A sum of three float32, each of magnitude below the sum of magnitudes.
    bound = (np.abs(sums) * scale * float(codes.grid.scale)).sum(0) * 8 * 2**-24
    assert (np.abs(network(ROWS) - expected) <= bound).all()


@pytest.mark.parametrize("layout", ["ik", "ki"])
def test_groups_lie_along_the_summed_axis_wherever_it_is(layout):
    w = WEIGHTS if layout == "ik" else WEIGHTS.T
    function = lambda w, x: jnp.einsum(f"ni,{layout}->nk", x, w)  # noqa: E731
    network = jaxqat.calibrate(function, {"params": w}, batches=[ROWS], recipe=recipe())
    np.testing.assert_array_equal(network(ROWS), product(recipe())(ROWS))


def test_batched_dots_have_groups_in_each_of_the_batch():
    w = np.stack([WEIGHTS, 3 * WEIGHTS[::-1]])
    x = RNG.normal(size=(2, 6, 12)).astype(np.float32)
    function = lambda w, x: jnp.einsum("bni,bik->bnk", x, w)  # noqa: E731
    network = jaxqat.calibrate(function, {"params": w}, batches=[x], recipe=recipe())
    exact = np.einsum("bni,bik->bnk", x.astype(np.float64), w)
    error = np.linalg.norm(network(x) - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02  # Of 8 bits.
    assert [row.macs for row in network.layers(x)] == [2 * 6 * 12 * 5]


def test_groups_are_closer_to_the_float_weights_than_channels_where_magnitudes_differ():
    def error(granularity):
        settings = recipe(weight_granularity=granularity, weight_bits=3)
        return np.linalg.norm(product(settings)(ROWS) - ROWS @ WEIGHTS)

    assert error("per_group") < 0.95 * error("per_channel")


def test_gradients_are_those_of_the_float_product_at_the_rounded_values():
    network = product(recipe())
    codes = next(iter(network.record(ROWS).codes.values()))
    rounded = (np.asarray(codes.codes, np.float32) - codes.grid.zero) * codes.grid.scale
    g = RNG.normal(size=(6, 5)).astype(np.float32)
    of_w, of_x = jax.grad(
        lambda w, x: jnp.sum(network.with_variables(params=w)(x) * g), argnums=(0, 1)
    )(WEIGHTS, ROWS)
    # Sums of 6 and of 5 products in float32.
    np.testing.assert_allclose(of_w, rounded.T @ g, atol=2**-19)
    k, scale = group_codes(WEIGHTS)
    weights = (k * scale).reshape(12, 5)
    kept = np.abs(rounded - ROWS) <= 0.51 * float(codes.grid.scale)
    expected = np.where(kept, g @ weights.T, 0)
    np.testing.assert_allclose(of_x, expected, atol=2**-14)  # Weights up to 90.


def test_clipping_estimators_work_in_each_group():
    settings = recipe(weight_range="mse", weight_bits=3)
    network = product(settings)
    gradient = jax.grad(lambda w: jnp.sum(network.with_variables(params=w)(ROWS)))(WEIGHTS)
    assert np.isfinite(gradient).all() and np.any(gradient != 0)


def test_a_network_with_groups_is_refused_by_a_strict_conversion_with_the_reason():
    with pytest.raises(jaxqat.ConversionError, match="groups with scales of their own"):
        jaxqat.convert(product(recipe()), ROWS[:1], strict=True)


def test_groups_that_do_not_divide_and_layers_without_groups_are_named():
    model = jaxqat.quantize(lambda p, x: x @ p["w"], recipe(group_size=5))
    with pytest.raises(RecipeError, match=r"group_size 5 does not divide the 12 inputs of w"):
        model.init_quant({"params": {"w": WEIGHTS}}, ROWS)

    def conv(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    kernel = {"params": {"w": RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)}}
    with pytest.raises(RecipeError, match=r"dense layers .* and w is none"):
        jaxqat.quantize(conv, recipe()).init_quant(kernel, IMAGES)
    rules = (Rule(kind="conv", weight_granularity="per_channel"),)
    assert jaxqat.quantize(conv, recipe(rules=rules)).init_quant(kernel, IMAGES)["quant"]
    with pytest.raises(RecipeError, match="'lsq' learns one step size per channel"):
        recipe(weight_range="lsq")
