"""Range estimators against searches written in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqat
from jaxqat import Recipe, RecipeError, Rule
from jaxqat.quant._numerics import estimators as estimate
from jaxqat.quant.recipe import Settings

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
# Long tails, so that clipping pays.
HEAVY = RNG.standard_t(3, size=(16, 8, 12)).astype(np.float32)
ROWS = RNG.normal(size=(32, 12)).astype(np.float32)


def squared_error(x, low, high, bits, symmetric):
    """Of values rounded to the grid of a range, in float64."""
    low, high = float(low), float(high)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale, zero, bottom = max(abs(low), abs(high)) / top, 0, -top
    else:
        top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = np.clip(bottom - np.round(low / scale), bottom, top)
    x = x.astype(np.float64)
    rounded = (np.clip(np.round(x / scale) + zero, bottom, top) - zero) * scale
    return np.mean((rounded - x) ** 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("activations", ["affine", "symmetric"])
def test_mse_finds_the_fraction_of_least_squared_error(bits, activations):
    settings = Settings(act_bits=bits, activations=activations, act_range="mse")
    low, high = map(float, estimate.activation_extent(jnp.asarray(HEAVY), settings))
    errors = [
        squared_error(HEAVY, f * HEAVY.min(), f * HEAVY.max(), bits, activations == "symmetric")
        for f in estimate.FRACTIONS
    ]
    found = squared_error(HEAVY, low, high, bits, activations == "symmetric")
    # Two fractions whose errors differ by less than float32 tells apart may change places.
    assert found <= min(errors) * (1 + 2**-12)
    if bits <= 4:  # The extremes are no optimum: there is a choice.
        assert errors[-1] > 1.01 * min(errors)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_leaves_out_the_same_share_at_each_end(percentile):
    settings = Settings(act_range="percentile", percentile=percentile)
    low, high = estimate.activation_extent(jnp.asarray(HEAVY), settings)
    expected = np.percentile(HEAVY.astype(np.float64), [100 - percentile, percentile])
    # Interpolation between neighbours: the weight of one is rounded to 2**-24 of an index < 2**11.
    np.testing.assert_allclose([low, high], expected, rtol=2**-9)


def test_snr_bounds_are_those_of_aqt_for_a_symmetric_grid():
    settings = Settings(act_bits=4, act_range="snr", activations="symmetric")
    low, high = map(float, estimate.activation_extent(jnp.asarray(HEAVY), settings))
    largest = np.abs(HEAVY).max()
    errors = [squared_error(HEAVY, -f * largest, f * largest, 4, True) for f in estimate.FRACTIONS]
    assert squared_error(HEAVY, low, high, 4, True) <= min(errors) * (1 + 2**-12)


@pytest.mark.parametrize("weight_range", ["mse", "snr"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axes", [(0,), (0, 1)])
def test_weights_have_the_scale_of_least_squared_error_in_each_channel(weight_range, bits, axes):
    w = RNG.standard_t(3, size=(40, 5)).astype(np.float32)
    settings = Settings(weight_bits=bits, weight_range=weight_range)
    scale = np.asarray(estimate.weight_scale(jnp.asarray(w), settings, axes), np.float64)
    assert scale.shape == tuple(1 if a in axes else n for a, n in enumerate(w.shape))
    top = 2 ** (bits - 1) - 1

    def error(scale):
        rounded = np.clip(np.round(w / scale), -top, top) * scale
        return np.mean((rounded - w) ** 2, axis=axes, keepdims=True)

    largest = np.abs(w.astype(np.float64)).max(axis=axes, keepdims=True)
    best = np.min([error(f * largest / top) for f in estimate.FRACTIONS], axis=0)
    assert (error(scale) <= best * (1 + 2**-12)).all()


def test_a_percentile_of_weights_is_of_their_magnitudes():
    w = RNG.normal(size=(200, 3)).astype(np.float32)
    settings = Settings(weight_range="percentile", percentile=95.0)
    scale = estimate.weight_scale(jnp.asarray(w), settings, (0,))
    expected = np.percentile(np.abs(w), 95.0, axis=0, keepdims=True) / 127
    np.testing.assert_allclose(scale, expected, rtol=2**-12)  # Indices below 2**8, as above.


def test_minmax_keeps_the_extremes_where_ema_averages():
    params = {"w": np.eye(12, dtype=np.float32)}
    batches = [ROWS, 3 * ROWS, ROWS]
    for recipe, high in (
        (Recipe(act_range="minmax"), 3 * ROWS.max()),
        (Recipe(act_range="ema"), (ROWS.max() + 3 * ROWS.max() + ROWS.max()) / 3),
    ):
        function = lambda p, x: x @ p["w"]  # noqa: E731
        network = jaxqat.calibrate(function, {"params": params}, batches=batches, recipe=recipe)
        ranges = network.variables["quant"]
        np.testing.assert_allclose(ranges["w"]["input"]["max"], high, rtol=2**-20)


@pytest.mark.slow
@pytest.mark.parametrize("act_range", ["percentile", "mse", "snr"])
@pytest.mark.parametrize("weight_range", ["percentile", "mse", "snr"])
def test_a_network_of_any_estimator_becomes_the_same_integer_network(act_range, weight_range):
    params = {name: RNG.normal(0, 0.4, (12, 12)).astype(np.float32) for name in ("first", "second")}

    def function(params, x):
        return jnp.maximum(x @ params["first"], 0) @ params["second"]

    recipe = Recipe(
        weight_bits=4, act_bits=6, act_range=act_range, weight_range=weight_range, percentile=97.0
    )
    network = jaxqat.calibrate(function, {"params": params}, batches=[ROWS], recipe=recipe)
    graph = jaxqat.convert(network, ROWS[:1])
    check = jaxqat.verify(network, graph=graph, batches=[ROWS])
    assert (check.differing, check.top1_flips) == (0, 0)
    weights = next(graph.products()).weights
    assert np.abs(weights).max() == 7  # Clipped to 4 bits: the largest code is used.


def test_clipped_weights_get_no_gradient_and_others_get_it_whole():
    w = np.linspace(-1, 1, 24, dtype=np.float32).reshape(12, 2)
    recipe = Recipe(weight_range="percentile", percentile=60.0)
    function = lambda w, x: x @ w  # noqa: E731
    network = jaxqat.calibrate(function, {"params": w}, batches=[ROWS], recipe=recipe)

    gradient = jax.grad(lambda w: jnp.sum(network.with_variables(params=w)(ROWS)))(w)
    gradient = np.asarray(gradient)
    codes, _ = integers_of(w, 60.0)
    assert ((gradient == 0) == (np.abs(codes) > 127)).all()
    assert 0 < (gradient == 0).sum() < gradient.size


def integers_of(w, percentile):
    scale = np.percentile(np.abs(w), percentile, axis=0, keepdims=True) / 127
    return np.round(w / scale), scale


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        (
            (Rule(path="b", activations="symmetric"),),
            r"b and a read the same tensor, .* activations 'symmetric' and 'affine' at once",
        ),
        (
            (Rule(path="b", act_range="mse"),),
            r"b and a read the same tensor, .* act_range 'mse' and 'ema' at once",
        ),
    ],
)
def test_rules_that_conflict_over_a_tensor_are_an_error_that_names_both_layers(rules, match):
    params = {"a": np.eye(12, dtype=np.float32), "b": np.eye(12, dtype=np.float32)}
    model = jaxqat.quantize(lambda p, x: x @ p["a"] + x @ p["b"], Recipe(rules=rules))
    with pytest.raises(RecipeError, match=match):
        model.init_quant({"params": params}, ROWS)


def test_a_dynamic_range_beside_a_static_one_of_the_same_tensor_is_an_error():
    params = {"a": np.eye(12, dtype=np.float32), "b": np.eye(12, dtype=np.float32)}
    for dynamic in "ab":  # Whichever comes first.
        rules = (Rule(path=dynamic, act_range="dynamic"),)
        recipe = Recipe(activations="symmetric", rules=rules)
        model = jaxqat.quantize(lambda p, x: x @ p["a"] + x @ p["b"], recipe)
        with pytest.raises(RecipeError, match=r"read the same tensor, .* act_range 'dynamic'"):
            model.init_quant({"params": params}, ROWS)


def test_rules_that_conflict_across_a_maximum_pool_are_an_error():
    kernel = RNG.normal(size=(3, 3, 3, 3)).astype(np.float32)
    images = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def function(p, x):
        h = jnp.maximum(conv(x, p["a"]), 0)
        return conv(h, p["b"]).mean(), conv(nn.max_pool(h, (2, 2), (2, 2)), p["c"]).mean()

    recipe = Recipe(rules=(Rule(path="c", activations="symmetric"),))
    with pytest.raises(RecipeError, match="c and b read the same tensor"):
        params = dict.fromkeys("abc", kernel)
        jaxqat.quantize(function, recipe).init_quant({"params": params}, images)


@pytest.mark.parametrize("percentile", ["99", 50, 100.1, True])
def test_a_percentile_that_is_none_is_refused(percentile):
    with pytest.raises(RecipeError, match=r"quant.rules.percentile must be in \(50, 100\]"):
        Rule(percentile=percentile)


def test_a_rule_changes_only_what_it_sets():
    recipe = Recipe(
        weight_bits=4, act_bits=6, rules=(Rule(path="b", weight_range="mse", act_bits=5),)
    )
    settings = recipe.settings("b", "dense")
    assert settings == Settings(weight_bits=4, act_bits=5, weight_range="mse")
    assert recipe.settings("a", "dense") == Settings(weight_bits=4, act_bits=6)


def test_first_and_last_layer_keep_their_own_width_unless_a_rule_decides():
    params = {name: np.eye(12, dtype=np.float32) for name in ("a", "b", "c")}

    def function(p, x):
        return jnp.maximum(jnp.maximum(x @ p["a"], 0) @ p["b"], 0) @ p["c"]

    recipe = Recipe(weight_bits=2, act_bits=3, first_last_bits=8)
    table = jaxqat.quantize(function, recipe).layers({"params": params}, ROWS)
    assert [(row.weight_bits, row.act_bits) for row in table] == [(8, 8), (2, 3), (8, 8)]
    ruled = Recipe(weight_bits=2, act_bits=3, first_last_bits=8, rules=(Rule(path="c"),))
    table = jaxqat.quantize(function, ruled).layers({"params": params}, ROWS)
    assert [(row.weight_bits, row.act_bits) for row in table] == [(8, 8), (2, 3), (2, 3)]


def test_stochastic_rounding_goes_up_as_often_as_the_rest_says_and_only_in_training():
    w = np.tile(np.asarray([0.3, -0.75, 1.0], np.float32)[:, None], (1, 4000))
    w = np.concatenate([w, np.full((9, 4000), 3.0, np.float32)])
    # Of 3 bits and per tensor, one step is 1.
    recipe = Recipe(weight_bits=3, weight_granularity="per_tensor", rounding="stochastic")
    rows = np.eye(12, dtype=np.float32)
    model = jaxqat.quantize(lambda w, x: x @ w, recipe)
    network = jaxqat.calibrate(model, {"params": w}, batches=[rows])
    variables = network.variables
    first, updates = model.apply(variables, rows, mutable=["quant"])
    codes = np.round(np.asarray(first)[:3])
    assert set(np.unique(codes[0])) == {0, 1} and set(np.unique(codes[1])) == {-1, 0}
    # 4,000 throws of probability p: five standard deviations are 5 sqrt(p (1 - p) / 4000) < 0.04.
    np.testing.assert_allclose(codes.mean(1), [0.3, -0.75, 1.0], atol=0.04)
    again, _ = model.apply(variables, rows, mutable=["quant"])
    np.testing.assert_array_equal(first, again)  # The state is the seed,
    after, _ = model.apply({**variables, **updates}, rows, mutable=["quant"])
    assert np.any(after != first)  # and moves with each step.
    nearest = np.round(np.asarray(network(rows))[:3])
    assert [np.unique(row).tolist() for row in nearest] == [[0], [-1], [1]]


def test_stochastic_rounding_leaves_the_gradient_straight_through():
    w = RNG.normal(size=(12, 4)).astype(np.float32)
    recipe = Recipe(weight_bits=4, rounding="stochastic")
    model = jaxqat.quantize(lambda w, x: x @ w, recipe)
    network = jaxqat.calibrate(model, {"params": w}, batches=[ROWS])

    def result(w):
        variables = {**network.variables, "params": w}
        return model.apply(variables, ROWS, mutable=["quant"])[0]

    found = jax.grad(lambda w: jnp.sum(result(w)))(w)
    codes = next(iter(network.record(ROWS).codes.values()))
    rounded = (np.asarray(codes.codes, np.float32) - codes.grid.zero) * codes.grid.scale
    np.testing.assert_allclose(found, np.tile(rounded.sum(0)[:, None], 4), atol=2**-17)


def test_stochastic_rounding_without_a_range_to_count_is_refused():
    with pytest.raises(RecipeError, match="'stochastic' takes its seed from the count"):
        Recipe(activations="symmetric", act_range="dynamic", rounding="stochastic")
