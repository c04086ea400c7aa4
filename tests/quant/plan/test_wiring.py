"""Models that are wired unlike a ResNet: what is quantized in them, where, and its settings."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import DenyList
from flax.traverse_util import flatten_dict

import jaxqat
from jaxqat import Recipe, RecipeError, Rule
from jaxqat.quant._plan.plan import VARIABLE_WEIGHTS

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
ROWS = RNG.normal(size=(32, 12)).astype(np.float32)


def weights(*shape, mean=0.0):
    return np.random.default_rng(sum(shape)).normal(mean, 0.3, shape).astype(np.float32)


def calibrated(function, params, x, recipe: Recipe | str = "int8"):
    network = jaxqat.quantize(function, recipe).bind({"params": params}).calibrate(x)
    return network, network.variables["quant"]


def keys(state):
    return {"/".join(key[:-1]) for key in flatten_dict(state)}


def relative_error(function, params, x, **options):
    network, _ = calibrated(function, params, x, **options)
    expected = np.asarray(function(params, x))
    return np.linalg.norm(np.asarray(network(x)) - expected) / np.linalg.norm(expected)


def conv(x, w, padding="SAME"):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def steps_off_grid(values, grid_range):
    """How far values are from a grid's points, in steps."""
    low, high = min(float(grid_range["min"]), 0), max(float(grid_range["max"]), 0)
    steps = np.asarray(values, np.float64) / ((high - low) / 255)
    return np.abs(steps - np.round(steps)).max()


def test_a_skip_beside_an_explicitly_padded_convolution_reads_quantized_values():
    params = {"a": weights(3, 3, 3, 8), "b": weights(3, 3, 8, 8)}

    def model(params, x):
        y = jax.nn.relu(conv(x, params["a"]))
        padded = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return conv(padded, params["b"], "VALID"), y

    quantized, state = calibrated(model, params, IMAGES)
    skip = quantized(IMAGES)[1]
    # Dequantized float32 codes over a float32 scale: a few roundings of up to 255 steps.
    assert steps_off_grid(skip, state["b"]["input"]) < 255 * 2**-20
    assert relative_error(lambda p, x: model(p, x)[0], params, IMAGES) < 0.05


def test_a_pre_activation_network_has_a_range_for_its_residual_stream():
    params = {"a": weights(3, 3, 3, 8), "b": weights(3, 3, 8, 8), "c": weights(3, 3, 8, 8)}
    gain = np.float32(np.linspace(0.5, 1.5, 8))

    def model(params, x):
        x = conv(x, params["a"])
        x = x + conv(jax.nn.relu(x * gain + 0.1), params["b"])
        return conv(jax.nn.relu(x * gain - 0.1), params["c"])

    _, state = calibrated(model, params, IMAGES)
    terms = {"a/output", "b/output"}
    assert keys(state) == {"a/input", "b/input", "c/input", "c/add", *terms}
    assert relative_error(model, params, IMAGES) < 0.05


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x)).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5, name="head")(x)


def test_dropout_neither_moves_nor_loses_a_range():
    model, key = jaxqat.quantize(Dropped()), jax.random.key(0)
    rngs = {"params": key, "dropout": key}
    variables = model.init(rngs, IMAGES, train=True)
    variables = model.init_quant(variables, IMAGES, train=True, rngs=rngs)
    assert keys(variables["quant"]) == {"conv/input", "head/pool", "head/input"}
    empty = model.init_quant(variables, IMAGES, train=False)
    assert keys(empty["quant"]) == keys(variables["quant"])
    variables = model.calibrate(variables, IMAGES, train=True, rngs={"dropout": key})
    step = functools.partial(model.apply, train=True, mutable=["quant"], rngs={"dropout": key})
    _, updates = jax.jit(step)(variables, IMAGES)
    assert jax.tree.structure(updates["quant"]) == jax.tree.structure(variables["quant"])
    assert int(updates["quant"]["head"]["pool"]["count"]) == 2
    assert np.isfinite(model.apply({**variables, **updates}, IMAGES, train=False)).all()


def test_a_range_that_a_call_does_not_meet_stays_as_it_is():
    params = {"a": weights(12, 8), "b": weights(12, 8)}

    def model(params, x, which):
        return x[:, :12] @ params[which]

    quantized = jaxqat.quantize(model)
    state = {
        **quantized.init_quant({"params": params}, ROWS, "a")["quant"],
        **quantized.init_quant({"params": params}, ROWS, "b")["quant"],
    }
    state = quantized.calibrate({"params": params, "quant": state}, ROWS, "a")["quant"]
    assert (int(state["a"]["input"]["count"]), int(state["b"]["input"]["count"])) == (1, 0)


def test_a_weight_that_meets_two_tensors_has_a_range_for_each():
    params = {"w": weights(12, 12)}

    def model(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    _, state = calibrated(model, params, ROWS)
    assert keys(state) == {"w/input", "w/input2", "w/argument"}
    assert float(state["w"]["input2"]["max"]) <= 1.0 < float(state["w"]["input"]["max"])
    assert relative_error(model, params, ROWS) < 0.05


def test_a_tensor_with_readers_of_different_widths_has_the_larger():
    params = {"low": weights(1, 1, 3, 8), "high": weights(3, 3, 3, 8)}
    rules = (Rule(path="low", weight_bits=4, act_bits=4),)

    def same(params, x):
        return conv(x, params["low"]) + conv(x, params["high"])

    def pooled(params, x):
        y = nn.max_pool(nn.max_pool(x, (2, 2)), (2, 2))
        return conv(x, params["low"])[:, :6, :6] + conv(y, params["high"])

    for model in (same, pooled):
        quantized = jaxqat.quantize(model, Recipe(rules=rules))
        table = quantized.layers({"params": params}, IMAGES)
        assert [(i.path, i.weight_bits, i.act_bits) for i in table] == [
            ("low", 4, 8),
            ("high", 8, 8),
        ]
        assert keys(quantized.init_quant({"params": params}, IMAGES)["quant"]) == {"low/input"}


def test_relu6_clips_the_codes_at_six():
    params = {"a": 4 * weights(3, 3, 3, 8), "b": weights(3, 3, 8, 8)}

    def model(params, x):
        return conv(jax.nn.relu6(conv(x, params["a"])), params["b"])

    quantized, state = calibrated(model, params, IMAGES)
    wide = {"min": jnp.float32(0), "max": jnp.float32(12.75), "count": jnp.int32(1)}
    state["b"]["input"] = wide
    codes = np.asarray(quantized.with_variables(quant=state).codes(IMAGES)["b/input"], int)
    # Six is 120 steps of 12.75 / 255; the zero point is -128.
    assert codes.max() == -8 and codes.min() == -128


def test_signs_and_constants_between_layers_stay_exact():
    params = {"a": weights(12, 8), "b": weights(8, 4)}

    def model(params, x):
        return jnp.abs(1.5 - (-(x @ params["a"]))) @ params["b"] + (2.0 - x @ params["a"])[:, :4]

    def form_only(params, x):
        return (1.5 - (-(x @ params["a"]))) @ params["b"]

    assert relative_error(model, params, ROWS) < 0.05
    assert relative_error(form_only, params, ROWS) < 0.05


def test_average_pooling_is_the_sum_of_codes():
    params = {"a": weights(3, 3, 3, 8), "b": weights(3, 3, 8, 8)}

    def model(params, x):
        y = nn.avg_pool(jax.nn.relu(conv(x, params["a"])), (2, 2), (2, 2))
        return conv(y, params["b"])

    quantized, state = calibrated(model, params, IMAGES)
    assert keys(state) == {"a/input", "b/input", "b/pool"}
    codes = {k: np.asarray(v, np.int64) for k, v in quantized.codes(IMAGES).items()}
    fine, coarse = (float(state["b"][name]["max"]) / 255 for name in ("pool", "input"))
    total = (codes["b/pool"] + 128).reshape(4, 4, 2, 4, 2, 8).sum((2, 4))
    expected = np.round(total * (fine / 4 / coarse)) - 128
    np.testing.assert_array_equal(codes["b/input"], np.clip(expected, -128, 127))


def test_concatenated_branches_are_each_rounded_once_to_the_common_grid():
    params = {"a": weights(12, 8), "b": weights(12, 4), "c": weights(12, 4)}

    def model(params, x):
        return jnp.concatenate([x @ params["a"], x @ params["b"]], axis=1) @ params["c"]

    assert relative_error(model, params, ROWS) < 0.05


def test_an_integer_cast_is_not_a_change_of_type_only():
    params = {"a": 5 * weights(12, 8), "b": weights(8, 4)}

    def model(params, x):
        whole = (x @ params["a"]).astype(jnp.int32).astype(jnp.float32)
        return whole @ params["b"]

    def through_weights(params, x):
        return x @ params["a"].astype(jnp.int32).astype(jnp.float32)

    assert relative_error(model, params, ROWS) < 0.05
    assert relative_error(through_weights, params, ROWS) < 0.02
    quantized, _ = calibrated(through_weights, params, ROWS)
    gradient = jax.grad(lambda p: quantized.with_variables(params=p)(ROWS).sum())(params)
    assert not np.asarray(gradient["a"]).any()


def test_a_large_mean_before_batch_norm_does_not_make_a_channel_constant():
    params = {"w": weights(16384, 16, mean=0.3), "head": weights(16, 4)}
    x = np.abs(np.random.default_rng(5).normal(size=(64, 16384))).astype(np.float32)
    y = x @ params["w"]
    mean, deviation = y.mean(0), y.std(0)

    def model(params, x):
        return ((x @ params["w"] - mean) * (1 / deviation)) @ params["head"]

    # The mean is some 2**24 accumulator units; the deviation is what carries the information.
    # Rounding x (s / sqrt(12) of 255 steps over about 4 deviations) costs a fraction of a per cent
    # of each product, summed over 16384 of them, against a signal that is as random: about 1 %.
    assert relative_error(model, params, x) < 0.05


def test_one_scale_can_serve_a_whole_kernel():
    params = {"w": weights(12, 8) * np.float32(10.0) ** np.arange(8)}

    def model(params, x):
        return x @ params["w"]

    coarse = relative_error(lambda p, x: model(p, x)[:, :1], params, ROWS)
    assert coarse < 0.02
    recipe = Recipe(weight_granularity="per_tensor")
    quantized, _ = calibrated(model, params, ROWS, recipe)
    assert not np.asarray(quantized(ROWS))[:, 0].any()  # Below half a step.


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.remat(nn.Dense)(8, name="first")(x))


def test_remat_is_taken_apart():
    model = jaxqat.quantize(Remat())
    variables = model.module.init(jax.random.key(0), ROWS)
    table = model.layers(variables, ROWS)
    assert (table[0].path, table[0].weight_bits, table[0].float_reason) == ("first", 8, None)


def test_products_of_parameters_alone_are_named():
    params = {"latents": weights(4, 12), "w": weights(12, 8)}
    quantized = jaxqat.quantize(lambda p, x: x[:4, :8] + p["latents"] @ p["w"])
    reasons = [info.float_reason for info in quantized.layers({"params": params}, ROWS)]
    assert reasons == ["both operands depend on parameters only"]


def test_a_rule_that_an_earlier_one_shadows_is_an_error():
    recipe = Recipe(rules=(Rule(path=".*"), Rule(path="a", weight_bits=4, act_bits=4)))
    with pytest.raises(RecipeError, match=r"path='a'.*taken by a rule before it"):
        model = jaxqat.quantize(lambda p, x: x @ p["a"], recipe)
        model.init_quant({"params": {"a": weights(12, 8)}}, ROWS)


def test_the_same_tensor_by_jit_vmap_and_grad_of_vmap():
    params = {"a": weights(12, 8), "b": weights(8, 4)}

    @jax.jit
    def layer(x, w):
        return jax.nn.relu(x @ w)

    def model(params, x):
        return layer(x, params["a"]) @ params["b"]

    quantized, _ = calibrated(model, params, ROWS)
    expected = quantized(ROWS)
    by_row = jax.vmap(quantized)(ROWS)
    np.testing.assert_array_equal(by_row, expected)
    gradient = jax.grad(lambda p: jax.vmap(quantized.with_variables(params=p))(ROWS).sum())
    assert np.count_nonzero(gradient(params)["a"]) > 48


def test_mutable_takes_what_linen_takes():
    model = jaxqat.quantize(Dropped())
    variables = model.init(jax.random.key(0), IMAGES, train=False)
    variables = model.calibrate(variables, IMAGES, train=False)
    for mutable in (True, DenyList(("params",)), "quant", ["quant"]):
        _, updates = model.apply(variables, IMAGES, train=False, mutable=mutable)
        assert int(updates["quant"]["conv"]["input"]["count"]) == 2
    for mutable in ([], DenyList(("quant",))):
        _, updates = model.apply(variables, IMAGES, train=False, mutable=mutable)
        assert "quant" not in updates


def test_a_network_that_diverged_says_nan_from_the_next_step_on():
    params = {"a": weights(12, 8), "b": weights(8, 4)}

    def model(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    network, _ = calibrated(model, params, ROWS)
    quantized, variables = network.model, network.variables
    broken = {**params, "a": params["a"] * np.float32(np.nan)}
    _, updates = quantized.apply({**variables, "params": broken}, ROWS, mutable=["quant"])
    result, _ = quantized.apply({**variables, **updates}, ROWS, mutable=["quant"])
    assert np.isnan(result).any()


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_weights_that_are_not_real_numbers_stay_as_they_are_and_are_named(dtype):
    mixing = np.random.default_rng(0).integers(0, 3, size=(12, 6)).astype(dtype)
    params = {"mixing": {"w": mixing}, "head": {"kernel": weights(6, 4)}}

    def function(p, x):
        return jnp.abs(x @ p["mixing"]["w"]).astype(jnp.float32) @ p["head"]["kernel"]

    model, state = calibrated(function, params, ROWS)
    mixed, head = model.layers(ROWS)
    assert (mixed.path, mixed.weight_bits, head.weight_bits) == ("mixing", None, 8)
    assert mixed.float_reason == f"its operands are float32 and {dtype}, not real numbers"
    assert keys(state) == {"head/input"}
    assert relative_error(function, params, ROWS) < 0.02  # Of 8 bits in the other product.
    with pytest.raises(jaxqat.ConversionError, match=rf"mixing \(dense\): .* and {dtype}, not"):
        jaxqat.convert(model, ROWS[:1], strict=True)
    graph = jaxqat.convert(model, ROWS[:1])
    np.testing.assert_allclose(jaxqat.make_executor(graph)(ROWS), model(ROWS), rtol=1e-5, atol=1e-5)


def test_constant_matrices_are_no_layers_and_leave_the_edges_to_the_models_own():
    """Interpolation stands first and last; stem and head are the first and last layers."""
    params = {"stem": weights(3, 3, 3, 8), "body": weights(3, 3, 8, 8), "head": weights(8, 5)}

    def model(params, x):
        x = jax.image.resize(x, (x.shape[0], 12, 12, 3), "bilinear")
        x = jax.nn.relu(conv(x, params["stem"]))
        x = jax.nn.relu(conv(x, params["body"])) @ params["head"]
        return jax.image.resize(x, (x.shape[0], 20, 20, 5), "bilinear")

    recipe = Recipe(weight_bits=2, act_bits=4, first_last_bits=8)
    network, _ = calibrated(model, params, IMAGES, recipe)
    table = network.layers(IMAGES)
    bits = {row.path: row.weight_bits for row in table if row.settings is not None}
    assert bits == {"stem": 8, "body": 2, "head": 8}
    left = [row.float_reason for row in table if row.settings is None]
    assert set(left) == {"one operand is a constant, not a parameter"} and len(left) >= 2


class Mixed(nn.Module):
    """A DFT in a collection of its own, a layer with a mask of another, and two plain layers."""

    @nn.compact
    def __call__(self, x):
        real = jnp.asarray(np.fft.fft(np.eye(12)).real, jnp.float32)
        x = x @ self.variable("constants", "dft", lambda: real).value
        mask = self.variable("masks", "kept", lambda: jnp.arange(12.0)[:, None] % 2)
        x = x @ (mask.value * self.param("pruned", nn.initializers.normal(), (12, 8)))
        x = nn.Dense(6, name="body")(x)
        return nn.Dense(4, name="head")(x)


def test_a_product_with_a_variable_that_is_no_parameter_is_a_layer_only_by_a_rule():
    recipe = Recipe(weight_bits=2, act_bits=4, first_last_bits=8)
    model = jaxqat.quantize(Mixed(), recipe)
    variables = Mixed().init(jax.random.key(0), ROWS)
    table = model.bind(variables).layers(ROWS)
    # The first and the last layer are layers with parameters.
    bits = {row.path: row.weight_bits for row in table}
    assert bits == {"dft": None, "pruned": 8, "body": 2, "head": 8}
    assert table[0].float_reason == VARIABLE_WEIGHTS
    network = model.bind(variables).calibrate(ROWS)
    with pytest.raises(jaxqat.ConversionError, match=r"dft \(dense\): .* only a rule quantizes it"):
        jaxqat.convert(network, ROWS, strict=True)
    rule = Rule(path="dft", weight_bits=8, act_bits=8)
    model = jaxqat.quantize(Mixed(), dataclasses.replace(recipe, rules=(rule,)))
    bits = {row.path: row.weight_bits for row in model.layers(variables, ROWS)}
    assert bits == {"dft": 8, "pruned": 8, "body": 2, "head": 8}
    network = model.bind(variables).calibrate(ROWS)
    graph = jaxqat.convert(network, ROWS)
    assert not jaxqat.verify(network, graph=graph, batches=[ROWS]).failures


def test_a_rule_for_a_variable_of_an_nnx_module_names_it_by_its_path():
    class Frozen(nnx.Variable):
        pass

    class Block(nnx.Module):
        def __init__(self):
            self.kernel = Frozen(jnp.asarray(weights(12, 5)))

        def __call__(self, x):
            return x @ self.kernel

    class Net(nnx.Module):
        def __init__(self):
            self.block, self.head = Block(), nnx.Linear(5, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(self.block(x))

    rows = jaxqat.quantize(Net()).layers(ROWS)
    assert [(row.path, row.float_reason) for row in rows] == [
        ("block", VARIABLE_WEIGHTS),
        ("head", None),
    ]
    recipe = Recipe(rules=(Rule(path="block"),))
    rows = jaxqat.quantize(Net(), recipe).layers(ROWS)
    assert [(row.path, row.weight_bits) for row in rows] == [("block", 8), ("head", 8)]
