"""Models of others, as they are: quantized, trained, and converted or refused with the reason."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import equinox_models, models, nnx_models
from zoo.harness import (
    IMAGES,
    TOKENS,
    Quantized,
    at,
    check_in_onnx_runtime,
    copied,
    function,
    linen,
    nnx_module,
)

import jaxqat
from jaxqat import Recipe, Rule
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow

ATTENTION = Recipe(rules=(Rule(kind="attention"),))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        make: Quantizes and calibrates it by a recipe.
        products: Its layers by kind, in the order of computation.
        refused: What stands in the way of an integer network, as patterns; none if it becomes one.
        float_pairs: How many products of two activations it has.
        learning_rate: Of Adam.
    """

    make: Callable[[Recipe | str], Quantized]
    products: dict[str, str]
    refused: tuple[str, ...] = ()
    float_pairs: int = 0
    learning_rate: float = 5e-3


def function_parameters() -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        (rng.normal(0, 0.2, shape).astype(np.float32), np.zeros(shape[1], np.float32))
        for shape in ((64, 12), (12, 5))
    ]


def equinox_cnn(recipe: Recipe | str) -> Quantized:
    module = equinox_models.CNN(jax.random.key(0))
    return function(module, module, IMAGES, recipe)


def kinds(kind: str, *paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, kind)


def encoder_block(name: str, attention: str, *mlp: str) -> dict[str, str]:
    heads = [f"{name}/{attention}/{part}" for part in ("query", "key", "value", "out")]
    return kinds("dense", *heads, *(f"{name}/{layer}" for layer in mlp))


PAIRS = r"/dot_general\d+ \(dense\): both operands depend on the data"
ENCODER = Case(
    lambda recipe: linen(models.TransformerEncoder(num_layers=1), TOKENS, recipe, modes=True),
    kinds("embed", "Embed_0")
    | encoder_block("layer_0", "SelfAttention_0", "MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1")
    | kinds("dense", "Dense_0"),
    refused=(
        r"layer_0/SelfAttention_0/.*" + PAIRS,
        r"layer_0/SelfAttention_0/query/input: a look-up in Embed_0 before it",
        r"layer_0/SelfAttention_0/out/input: .* before it has no integer form",
        r"layer_0/MlpBlock_0/Dense_0/input: .*layer_0/LayerNorm_1 before it",
        r"Dense_0/input: .*TransformerEncoder/LayerNorm_0 before it",
    ),
    float_pairs=2,
)
VIT = Case(
    lambda recipe: linen(models.ViT(num_layers=1), IMAGES, recipe, modes=False),
    kinds("conv", "embedding")
    | encoder_block(
        "encoderblock_0",
        "MultiHeadDotProductAttention_0",
        "MlpBlock_0/Dense_0",
        "MlpBlock_0/Dense_1",
    )
    | kinds("dense", "head"),
    refused=(
        r"encoderblock_0/MultiHeadDotProductAttention_0/.*" + PAIRS,
        r"encoderblock_0/MultiHeadDotProductAttention_0/query/input: 'add' in ViT before it",
        r"encoderblock_0/MlpBlock_0/Dense_0/input: .*encoderblock_0/LayerNorm_1 before it",
        r"head/input: .*ViT/encoder_norm before it",
    ),
    float_pairs=2,
)
CNN = Case(
    lambda recipe: linen(models.CNN(), IMAGES, recipe, modes=False),
    kinds("conv", "Conv_0", "Conv_1") | kinds("dense", "Dense_0", "Dense_1"),
)
HALF = kinds("conv", "conv_init", *(f"ResidualBlock_0/{n}" for n in ("Conv_0", "Conv_1")))
HALF |= kinds("conv", "ResidualBlock_0/conv_proj") | kinds("dense", "Dense_0")
GATES = [f"{side}{gate}" for gate in ("i", "f", "g", "o") for side in "ih"]

LINEN = {
    "cnn": CNN,
    "mobilenet": Case(
        lambda recipe: linen(models.MobileNet(), IMAGES, recipe, modes=True),
        kinds("conv", "stem")
        | kinds("conv", *(f"DepthwiseSeparable_{n}/Conv_{i}" for n in range(3) for i in range(2)))
        | kinds("dense", "head"),
    ),
    "vit": VIT,
    "lstm": Case(
        lambda recipe: linen(
            models.LSTMClassifier(cell=nn.OptimizedLSTMCell), TOKENS, recipe, modes=False
        ),
        kinds("embed", "embedder")
        | kinds("dense", *(f"OptimizedLSTMCell_0/{n}" for n in ("hi", "ii")), "output_layer"),
        refused=(
            r"OptimizedLSTMCell_0/ii/input: a look-up in embedder before it",
            r"OptimizedLSTMCell_0/hi/input: .*OptimizedLSTMCell_0 before it has no integer form",
        ),
        learning_rate=3e-2,
    ),
    "encoder": ENCODER,
    "shared module": Case(
        lambda recipe: linen(models.Siamese(), IMAGES, recipe, modes=False),
        # Twice in the table: it multiplies twice, and its results are two tensors.
        kinds("conv", "encoder/layers_0", "encoder/layers_2") | kinds("dense", "classifier"),
    ),
    "scan and remat": Case(
        lambda recipe: linen(models.DeepMLP(), IMAGES, recipe, modes=False),
        kinds("dense", "Dense_0")
        | kinds("dense", *(f"layers/Dense_{i}/{n}" for n in range(3) for i in range(2)))
        | kinds("dense", "Dense_1"),
        refused=(r"layers/Dense_0/2/input: .*DeepMLP/layers/LayerNorm_0 before it",),
    ),
    "bfloat16": Case(lambda recipe: linen(models.HalfResNet(), IMAGES, recipe, modes=True), HALF),
    "bfloat16 parameters": Case(
        lambda recipe: linen(
            models.HalfResNet(param_dtype=jnp.bfloat16), IMAGES, recipe, modes=True
        ),
        HALF,
        # A bfloat16 has 8 bits: smaller steps than 2**-9 of a weight are lost.
        learning_rate=2e-2,
    ),
}
OTHERS = {
    "nnx cnn": Case(
        lambda recipe: nnx_module(nnx_models.CNN(rngs=nnx.Rngs(0)), IMAGES, recipe),
        kinds("conv", "conv1", "conv2") | kinds("dense", "linear1", "linear2"),
    ),
    "nnx mobilenet": Case(
        lambda recipe: nnx_module(nnx_models.MobileNetV2(rngs=nnx.Rngs(0)), IMAGES, recipe),
        kinds("conv", "stem")
        | kinds(
            "conv",
            *(f"blocks/{n}/{c}" for n in range(2) for c in ("expand", "depthwise", "project")),
        )
        | kinds("dense", "head"),
    ),
    "nnx vit": Case(
        lambda recipe: nnx_module(
            nnx_models.VisionTransformer(num_layers=1, rngs=nnx.Rngs(0)), IMAGES, recipe
        ),
        kinds("conv", "patch_embeddings")
        | encoder_block("encoder/layers/0", "attn", "mlp/layers/0", "mlp/layers/3")
        | kinds("dense", "classifier"),
        refused=(
            r"encoder/layers/0/attn/\.\.\.qhd,\.\.\.khd->\.\.\.hqk" + PAIRS,
            r"encoder/layers/0/attn/query/input: .* before it has no integer form",
            r"classifier/input: the normalization final_norm before it has no integer form",
        ),
        float_pairs=2,
    ),
    "nnx lstm": Case(
        lambda recipe: nnx_module(nnx_models.LSTMClassifier(rngs=nnx.Rngs(0)), TOKENS, recipe),
        kinds("embed", "embed")
        # 'if' is a keyword of Python.
        | kinds("dense", *(f"rnn/cell/{'if_' if gate == 'if' else gate}" for gate in GATES))
        | kinds("dense", "head"),
        refused=(
            r"rnn/cell/ii/input: a look-up in embed before it",
            r"rnn/cell/hi/input: 'logistic' in rnn/cell before it",
        ),
        learning_rate=3e-2,
    ),
    "equinox cnn": Case(
        equinox_cnn,
        kinds("conv", "layers/0") | kinds("dense", "layers/4", "layers/6"),
        learning_rate=2e-2,
    ),
    "function": Case(
        lambda recipe: function(models.function_mlp, function_parameters(), IMAGES, recipe),
        kinds("dense", "0", "1"),
    ),
}
ZOO = LINEN | OTHERS
CONVERTIBLE = [name for name, case in ZOO.items() if not case.refused]
REFUSED = [name for name, case in ZOO.items() if case.refused]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after a few steps; `calibrated` is its own tree before them."""

    quantized: Quantized
    calibrated: Any
    losses: list[float]
    gradients: Any


@functools.cache
def trained(name: str, recipe: Recipe | str = "int8") -> Trained:
    quantized = ZOO[name].make(recipe)
    calibrated = copied(quantized.weights(quantized.parameters))
    losses, gradients = quantized.train(15, ZOO[name].learning_rate)
    return Trained(quantized, calibrated, losses, gradients)


def weighted(run: Trained) -> list[jaxqat.LayerInfo]:
    """Quantized rows of the table that have weights."""
    rows = [row for row in run.quantized.table() if row.weight_bits is not None]
    return [row for row in rows if row.kind != "attention"]


def check_training(run: Trained) -> None:
    """The loss falls, all is finite, and each quantized weight has a gradient."""
    assert np.mean(run.losses[-3:]) < 0.8 * run.losses[0]
    for leaf in jax.tree.leaves((run.losses, run.gradients, run.quantized.parameters)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    gradients = run.quantized.weights(run.gradients)
    assert weighted(run)
    for row in weighted(run):
        gradient = np.asarray(at(gradients, row.weight_path), np.float32)
        assert np.abs(gradient).max() > 0, row.path


@pytest.mark.parametrize("name", ZOO)
def test_calibration_leaves_the_parameters_as_they_were_and_adds_one_collection(name):
    run = trained(name)
    jax.tree.map(np.testing.assert_array_equal, run.calibrated, run.quantized.before)
    types = [jax.tree.map(lambda x: x.dtype, t) for t in (run.calibrated, run.quantized.before)]
    assert types[0] == types[1]
    assert run.quantized.module_is_unchanged()
    of_nnx = {"QuantState", "QuantParam"}  # The latter is empty, unless step sizes are learned.
    added = {"quant"} if name in LINEN else of_nnx if name.startswith("nnx") else set()
    assert run.quantized.added == added


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_others_trains_and_every_quantized_weight_gets_a_gradient(name):
    check_training(trained(name))


@pytest.mark.parametrize("name", ZOO)
def test_every_product_with_weights_is_quantized_and_every_other_one_says_why_not(name):
    table, case = trained(name).quantized.table(), ZOO[name]
    quantized = {row.path: row for row in table if row.weight_bits is not None}
    assert {path: row.kind for path, row in quantized.items()} == case.products
    for row in quantized.values():
        assert (row.weight_bits, row.act_bits) == (8, None if row.kind == "embed" else 8)
    in_float = [row for row in table if row.weight_bits is None]
    assert [row.float_reason for row in in_float] == case.float_pairs * [
        "both operands depend on the data"
    ]


@pytest.mark.parametrize("name", ZOO)
def test_no_weight_of_the_parameter_tree_is_missing_from_the_table(name):
    """Counted in the tree: a scanned layer has a row per iteration, joined kernels have one."""
    run = trained(name)
    weights = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.calibrated):
        if re.search(r"\W(kernel|embedding|weight|\[0)\W*$", jax.tree_util.keystr(path)):
            weights += leaf.size
    # A module that is used twice has its weights once.
    sizes = {row.weight_path: math.prod(row.weight_shape) for row in weighted(run)}
    assert sum(sizes.values()) == weights


# Another type of the parameters changes nothing of what is converted.
BECOMES_INTEGER = pytest.mark.parametrize(
    "name", [n for n in CONVERTIBLE if n != "bfloat16 parameters"]
)


@functools.cache
def integer_network(name):
    return trained(name).quantized.convert()


@BECOMES_INTEGER
def test_a_model_without_obstacles_becomes_its_integer_network_to_the_last_code(name):
    quantized = trained(name).quantized
    assert quantized.describe().obstacles == ()
    check = quantized.verify(integer_network(name))
    assert check.codes > 20 * 12
    assert (check.differing, check.top1_flips) == (0, 0)


@BECOMES_INTEGER
def test_every_sum_is_an_integer_kernel_of_onnx_runtime(name, tmp_path):
    pytest.importorskip("onnxruntime")
    from export.onnx.fused import optimized

    from jaxqat.export._onnx.model import onnx_model

    graph = integer_network(name)
    counts = optimized(onnx_model(graph), tmp_path)
    sums = sum(isinstance(node, g.Add) for node in graph.nodes)
    assert (counts["QLinearAdd"], counts["Add"]) == (sums, 0)


@pytest.mark.filterwarnings("error:Explicitly requested dtype")  # Tokens are int64.
@pytest.mark.parametrize("name", REFUSED)
def test_a_strict_conversion_names_every_part_without_an_integer_form(name):
    quantized = trained(name).quantized
    with pytest.raises(jaxqat.ConversionError) as error:
        quantized.convert(strict=True)
    description = quantized.describe()
    in_float = [r.layer for r in description.layers if r.layer.float_reason is not None]
    told = [f"{row.path} ({row.kind}): {row.float_reason}" for row in in_float]
    assert sorted([*description.obstacles, *told]) == sorted(error.value.reasons)
    for pattern in ZOO[name].refused:
        assert any(re.match(f"(\\w+/)?{pattern}", reason) for reason in error.value.reasons), (
            pattern
        )


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_with_such_parts_becomes_a_network_with_float_islands(name, tmp_path):
    quantized = trained(name).quantized
    graph = jaxqat.load(jaxqat.save(quantized.convert(), tmp_path / "network"))
    assert graph.islands
    check = quantized.verify(graph)
    assert (check.differing, check.failures) == (0, ())
    assert check.codes + check.island_codes > 20 * 12
    check_in_onnx_runtime(quantized, graph)


@pytest.mark.parametrize("name", ["vit", "encoder"])
def test_attention_products_are_quantized_by_a_rule_and_the_model_trains(name):
    run = trained(name, ATTENTION)
    check_training(run)
    rows = [row for row in run.quantized.table() if row.kind == "attention"]
    assert len(rows) == ZOO[name].float_pairs
    assert all((r.weight_bits, r.act_bits, r.float_reason) == (8, 8, None) for r in rows)
    assert not any(row.float_reason for row in run.quantized.table())


# Bits of weights and inputs, of layers inside and at the edge.
RECIPES = {
    "int8_dynamic": ((8, 8), (8, 8)),
    "w4a4_lsq": ((4, 4), (8, 8)),
    "w4a8": ((4, 8), (4, 8)),
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("cnn", "w4a4_lsq"), ("cnn", "int8_dynamic"), ("encoder", "w4a4_lsq"), ("encoder", "w4a8")],
)
def test_other_recipes_train_the_same_models(name, recipe):
    run = trained(name, recipe)
    check_training(run)
    rows = [r for r in run.quantized.table() if r.kind in ("conv", "dense") and not r.float_reason]
    inside, edge = RECIPES[recipe]
    bits = [(row.weight_bits, row.act_bits) for row in rows]
    if name == "cnn":
        assert bits == [edge, inside, inside, edge]
    else:  # Its first layer is the embedding.
        (embedding,) = (row for row in run.quantized.table() if row.kind == "embed")
        assert (embedding.weight_bits, bits[-1]) == (edge[0], edge)
        assert set(bits[:-1]) == {inside}


@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_learned_step_sizes_get_gradients_and_stay_finite(name):
    run = trained(name, "w4a4_lsq")
    learned, gradients = (t["quant_params"] for t in (run.quantized.parameters, run.gradients))
    steps = jax.tree_util.tree_leaves_with_path(learned)
    rows = [row for row in run.quantized.table() if row.weight_bits is not None]
    assert len(steps) >= len(rows)  # Of each weight, and of each tensor.
    for (path, step), gradient in zip(steps, jax.tree.leaves(gradients), strict=True):
        assert np.abs(gradient).max() > 0, path
        # Adam may carry a small one below 0; it counts by its magnitude.
        assert np.isfinite(step).all() and np.all(step), path


def test_a_cnn_of_learned_low_bits_becomes_its_integer_network():
    quantized = trained("cnn", "w4a4_lsq").quantized
    graph = quantized.convert()
    assert [graph.nodes[-1].name, graph.output_shape] == ["Dense_1", (5,)]
    check = quantized.verify(graph)
    assert (check.differing, check.top1_flips) == (0, 0)


def test_dynamic_ranges_keep_the_cnn_from_being_converted_and_say_so():
    with pytest.raises(jaxqat.ConversionError, match="the dynamic range of the input of Dense_1"):
        trained("cnn", "int8_dynamic").quantized.convert(strict=True)
