"""The quantized computation against an integer network written in NumPy, and its shape."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.scope import DenyList
from flax.traverse_util import flatten_dict
from plain import others_long
from references.network import LAYERS, TENSORS, IntegerResidual, Residual, randomized

import jaxqat
from jaxqat import Recipe, RecipeError, Rule
from jaxqat.pipeline.models.resnet import ResNet

pytestmark = pytest.mark.slow

RECIPES = ["int8", "int8_symmetric"]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).normal(size=(6, 12, 12, 3)).astype(np.float32)


@functools.cache
def plain_variables():
    init = jitted(Residual().init, train=False, compiler_options=QUICKLY)
    return randomized(init(jax.random.key(0), jnp.zeros((1, 12, 12, 3))))


def calibrated(model, recipe, images):
    """The quantized `Residual` and its variables, with ranges from these images."""
    quantized = jaxqat.quantize(model, recipe)
    variables = quantized.init_quant(plain_variables(), images, train=False)
    calibrate = jax.jit(lambda v, x: quantized.calibrate(v, x, train=False))
    return quantized, {**calibrate(variables, images), **plain_variables()}


# Where only a rough value or a shape counts, XLA need not optimize: it compiles in a third.
QUICKLY = {"xla_backend_optimization_level": 0}


def jitted(method, *, compiler_options=None, **options):
    """A method of a quantized module, compiled: much faster than operation by operation."""
    return jax.jit(functools.partial(method, **options), compiler_options=compiler_options)


def ranges_of(variables):
    flat = flatten_dict(variables["quant"], sep="/")
    return {key: (flat[f"{key}/min"], flat[f"{key}/max"]) for key in TENSORS}


@pytest.mark.parametrize("recipe", RECIPES)
def test_inference_gives_the_codes_of_an_integer_network_written_in_numpy(recipe, images):
    quantized, variables = calibrated(Residual(), recipe, images)
    codes = jitted(quantized.codes, train=False)(variables, images)
    logits = jitted(quantized.apply, train=False)(variables, images)

    symmetric = recipe == "int8_symmetric"
    network = IntegerResidual(variables, ranges_of(variables), symmetric=symmetric)
    expected = network(images.astype(np.float64))
    assert set(codes) == set(TENSORS)
    for key in TENSORS:
        assert codes[key].dtype == jnp.int8
        np.testing.assert_array_equal(np.asarray(codes[key], int), network.codes[key], err_msg=key)
    # The head's accumulator is below 2**24, so its float32 value is exact; four float32 roundings
    # (two scales, their product with it, the bias) on logits of order 1.
    np.testing.assert_allclose(logits, expected, atol=4 * 2**-23 * np.abs(expected).max())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_codes_are_close_to_the_float_network(recipe, images):
    """Guards against a reference that errs in the same way: floats know nothing of grids."""
    quantized, variables = calibrated(Residual(), recipe, images)
    logits = jitted(quantized.apply, train=False)(variables, images)
    plain = {k: v for k, v in variables.items() if k != "quant"}
    expected = np.asarray(Residual().apply(plain, images, train=False))  # pyright: ignore
    # Signal to noise of 8-bit networks of this depth is well above 20 dB (a ratio of 10).
    assert np.linalg.norm(np.asarray(logits) - expected) < 0.1 * np.linalg.norm(expected)


def test_a_channel_whose_gamma_is_zero_is_its_constant(images):
    """Its multiplier is 0, so its bias has no value in accumulator units."""
    quantized, variables = calibrated(Residual(), "int8", images)
    codes = np.asarray(jitted(quantized.codes, train=False)(variables, images)["conv2/input"], int)
    assert float(variables["params"]["norm1"]["scale"][1]) == 0.0
    assert len(np.unique(codes[..., 1])) == 1
    assert len(np.unique(codes[..., 2])) > 1


def test_a_tensor_with_two_readers_has_one_range_that_both_use(images):
    quantized, variables = calibrated(Residual(), "int8", images)
    table = {info.path: info for info in quantized.layers(variables, images, train=False)}
    assert tuple(table) == LAYERS
    assert table["conv3"].range_key == table["conv4"].range_key == ("conv3", "input")
    assert set(ranges_of(variables)) == {
        "/".join(key[:-1]) for key in flatten_dict(variables["quant"]) if key[-1] == "min"
    }


def test_training_and_inference_quantize_the_same_tensors(images):
    quantized, variables = calibrated(Residual(), "int8", images)
    empty = quantized.init_quant(variables, images, train=True, mutable=["batch_stats"])
    assert jax.tree.structure(empty["quant"]) == jax.tree.structure(variables["quant"])


def test_the_parameter_tree_is_the_models_own(images):
    model = Residual()
    options = {"train": False, "compiler_options": QUICKLY}
    plain = jitted(model.init, **options)(jax.random.key(0), images)
    quantized = jaxqat.quantize(model)
    initial = jitted(quantized.init, **options)(jax.random.key(0), images)
    variables = quantized.init_quant(initial, images, train=False)
    assert (set(initial), set(variables)) == ({*plain}, {*plain, "quant"})
    for name in plain:
        jax.tree.map(np.testing.assert_array_equal, variables[name], plain[name])


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "batch statistics"])
@pytest.mark.parametrize("recipe", others_long(RECIPES, ["int8"]))
def test_every_kernel_of_resnet18_gets_a_gradient(recipe, train):
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
    model = ResNet(depth=18, width=4, num_classes=10, stem="cifar")
    quantized = jaxqat.quantize(model, recipe)
    init = jitted(quantized.init, train=False, compiler_options=QUICKLY)
    variables = init(jax.random.key(0), images)
    mutable = ["batch_stats"] if train else False
    calibrate = jitted(quantized.calibrate, train=train, mutable=mutable, compiler_options=QUICKLY)
    variables = calibrate(variables, images)

    def loss(params):
        state = {**variables, "params": params}
        if train:
            mutable = ["batch_stats", "quant"]
            logits, _ = quantized.apply(state, images, train=True, mutable=mutable)
        else:
            logits = quantized.apply(state, images, train=False)
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    gradients = flatten_dict(
        jax.jit(jax.grad(loss), compiler_options=QUICKLY)(variables["params"]), sep="/"
    )
    kernels = {k: np.asarray(g) for k, g in gradients.items() if k.endswith("kernel")}  # pyright: ignore
    assert len(kernels) == 21
    for path, gradient in kernels.items():
        assert np.isfinite(gradient).all(), path
        # More than half of the weights: a kernel with a dead quantizer has none.
        assert np.count_nonzero(gradient) > 0.5 * gradient.size, path


PLATFORMS = ["cpu", "cuda", "tpu"]
TYPE = re.compile(r"x([a-z]+\d+)>")  # The element type of 'tensor<4x16x16x3xi8>'.


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training step"])
def test_every_product_of_the_forward_pass_lowers_to_integers(train, platform):
    images = jnp.zeros((4, 16, 16, 3))
    model = ResNet(depth=18, width=4, num_classes=10, stem="cifar")
    quantized = jaxqat.quantize(model, "int8_symmetric")

    def initial(key, images):
        variables = quantized.init(key, images, train=False)
        return quantized.init_quant(variables, images, train=False)

    variables = jax.eval_shape(initial, jax.random.key(0), images)

    def forward(variables, images):
        mutable = ["batch_stats", "quant"] if train else False
        return quantized.apply(variables, images, train=train, mutable=mutable)

    text = jax.jit(forward).trace(variables, images).lower(lowering_platforms=(platform,)).as_text()
    signatures = re.findall(r"stablehlo\.(convolution|dot_general)\b.*: \((.*)\) -> (.*)", text)
    kinds = {
        (name, *(TYPE.findall(operands)), TYPE.findall(result)[0])
        for name, operands, result in signatures
    }
    assert kinds == {("convolution", "i8", "i8", "i32"), ("dot_general", "i8", "i8", "i32")}
    assert sum(name == "convolution" for name, *_ in signatures) == 20


def test_every_product_carries_its_layers_path_into_the_compiled_program(images):
    quantized, variables = calibrated(Residual(), "int8", images)
    program = jitted(quantized.apply, train=False, mutable=["quant"])
    text = program.lower(variables, images).as_text("hlo", debug_info=True)
    for layer in quantized.layers(variables, images, train=False):
        assert re.search(rf'(convolution|dot)\(.*op_name="[^"]*/{layer.path}/', text), layer.path


def test_ranges_move_in_training_only(images):
    quantized, variables = calibrated(Residual(), "int8", images)
    step = jitted(quantized.apply, train=True, mutable=["batch_stats", "quant"])
    _, updates = step(variables, 2 * images)
    old, new = variables["quant"]["conv0"]["input"], updates["quant"]["conv0"]["input"]
    # The second batch counts half: the mean of the two maxima.
    np.testing.assert_allclose(new["max"], 1.5 * old["max"], rtol=1e-6)
    assert int(new["count"]) == 2
    step = jitted(
        quantized.apply, train=True, mutable=DenyList(("params", "quant", "quant_params"))
    )
    _, updates = step(variables, images)
    assert set(updates) == {"batch_stats"}


def test_ranges_are_used_one_step_late_but_for_the_first_batch(images):
    quantized = jaxqat.quantize(Residual(), "int8")
    variables = quantized.init_quant(plain_variables(), images, train=False)
    step = jitted(quantized.apply, train=False, mutable=["quant"])
    first, updates = step(variables, images)
    after, _ = step({**variables, **updates}, images)
    # Its own range, then the same from the state; terms of sums now know the range of the sum, and
    # have smaller units. Units were at most 1/255 of a range of some 10 deviations.
    assert 0 < np.abs(first - after).max() < 10 / 255 * np.std(first)
    again, _ = step({**variables, **updates}, images)
    np.testing.assert_array_equal(again, after)
    far, _ = step({**variables, **updates}, 100 * images)
    assert np.abs(far).max() < 10 * np.abs(first).max()  # Clipped to the range of the first.


def test_a_rule_that_matches_no_layer_is_an_error(images):
    recipe = Recipe(rules=(Rule(path="conv7", weight_bits=4, act_bits=4),))
    quantized = jaxqat.quantize(Residual(), recipe)
    with pytest.raises(RecipeError, match=r"'conv7'.*none of the 6 layers.*conv"):
        jax.eval_shape(jitted(quantized.init, train=False), jax.random.key(0), images)


def test_rules_set_bits_and_leave_layers_in_float_by_name(images):
    recipe = Recipe(
        rules=(
            Rule(path="conv0", weight_bits=None, act_bits=None),
            Rule(path="conv1", weight_bits=4, act_bits=6),
        )
    )
    quantized, variables = calibrated(Residual(), recipe, images)
    table = {info.path: info for info in quantized.layers(variables, images, train=False)}
    assert table["conv0"].weight_bits is None
    assert table["conv0"].float_reason == "the recipe leaves it in float"
    assert (table["conv1"].weight_bits, table["conv1"].act_bits) == (4, 6)
    codes = jitted(quantized.codes, train=False)(variables, images)
    assert "conv0/input" not in codes
    assert np.asarray(codes["conv1/input"]).min() >= -32
    assert np.asarray(codes["conv1/input"]).max() <= 31


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)


def test_a_product_of_two_activations_is_named_with_the_reason():
    x = jnp.ones((2, 5, 8))
    quantized = jaxqat.quantize(Attention(), "int8")
    table = quantized.layers(Attention().init(jax.random.key(0), x), x)
    left = [info for info in table if info.float_reason]
    assert len(table) == 6 and len(left) == 2
    assert all(info.float_reason == "both operands depend on the data" for info in left)


def test_a_plain_function_is_quantized_with_its_state_beside_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 8)).astype(np.float32)
    params = {
        "in": {"w": rng.normal(size=(8, 32)).astype(np.float32)},
        "out": {"w": rng.normal(size=(32, 4)).astype(np.float32)},
    }

    def model(params, x):
        return jax.nn.relu(x @ params["in"]["w"]) @ params["out"]["w"]

    quantized = jaxqat.quantize(model)
    variables = quantized.init_quant({"params": params}, x)
    assert [info.path for info in quantized.layers(variables, x)] == ["in", "out"]
    variables = quantized.calibrate(variables, x)
    actual, expected = quantized.apply(variables, x), model(params, x)
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)
    result, updates = quantized.apply(variables, x, mutable=["quant"])
    # The same codes; the last sums are multiplied by two scales, in another order.
    np.testing.assert_allclose(result, actual, rtol=4 * 2**-24)
    assert int(updates["quant"]["in"]["input"]["count"]) == 2


def test_variables_without_ranges_are_an_error_that_says_what_to_do(images):
    quantized = jaxqat.quantize(Residual())
    variables = plain_variables()
    with pytest.raises(jaxqat.QuantizationError, match=r"No activation ranges\. Call `calibrate`"):
        quantized.apply(variables, images, train=False)
    calibrated = quantized.calibrate(variables, images, train=False)
    del calibrated["quant"]["conv0"]
    with pytest.raises(jaxqat.QuantizationError, match=r"No range for 'conv0/input' \(ranges "):
        quantized.apply(calibrated, images, train=False)


@pytest.mark.parametrize("model", [3, None, "resnet", {"params": {}}, np.ones(3)], ids=str)
def test_what_is_neither_module_nor_function_is_refused(model: Any):
    name = f"int {model}" if isinstance(model, int) else type(model).__name__
    match = rf"Flax module .* or a function .* got {name}\."
    with pytest.raises(jaxqat.QuantizationError, match=match):
        jaxqat.quantize(model)  # pyright: ignore[reportCallIssue, reportArgumentType]
