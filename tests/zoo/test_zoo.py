"""Models of others, as they are: quantized, trained, and converted or refused with the reason."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest
from plain import others_long
from zoo.cases import LINEN, ZOO
from zoo.harness import Quantized, at, check_in_onnx_runtime, copied
from zoo.table import ATTENTION

import jaxqat
from jaxqat import Recipe
from jaxqat.integer import graph as g

pytestmark = pytest.mark.slow


CONVERTIBLE = [name for name, case in ZOO.items() if not case.refused]
REFUSED = [name for name, case in ZOO.items() if case.refused]
# Not in a plain `pytest`, which has others like them; an LSTM and a MobileNet in `test_more`.
LONG = ("lstm", "nnx lstm", "nnx vit", "nnx mobilenet", "bfloat16 parameters")


def marked(names: Iterable[str]) -> list[Any]:
    names = list(names)
    return others_long(names, [name for name in names if name not in LONG])


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


@pytest.mark.parametrize("name", marked(ZOO))
def test_calibration_leaves_the_parameters_as_they_were_and_adds_one_collection(name):
    run = trained(name)
    jax.tree.map(np.testing.assert_array_equal, run.calibrated, run.quantized.before)
    types = [jax.tree.map(lambda x: x.dtype, t) for t in (run.calibrated, run.quantized.before)]
    assert types[0] == types[1]
    assert run.quantized.module_is_unchanged()
    of_nnx = {"QuantState", "QuantParam"}  # The latter is empty, unless step sizes are learned.
    added = {"quant"} if name in LINEN else of_nnx if name.startswith("nnx") else set()
    assert run.quantized.added == added


@pytest.mark.parametrize("name", marked(ZOO))
def test_a_model_of_others_trains_and_every_quantized_weight_gets_a_gradient(name):
    check_training(trained(name))


@pytest.mark.parametrize("name", marked(ZOO))
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


@pytest.mark.parametrize("name", marked(ZOO))
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
    "name", marked(name for name in CONVERTIBLE if name != "bfloat16 parameters")
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
@pytest.mark.parametrize("name", marked(REFUSED))
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


@pytest.mark.parametrize("name", marked(REFUSED))
def test_a_model_with_such_parts_becomes_a_network_with_float_islands(name, tmp_path):
    quantized = trained(name).quantized
    graph = jaxqat.load(jaxqat.save(quantized.convert(), tmp_path / "network"))
    assert graph.islands
    check = quantized.verify(graph)
    assert (check.differing, check.failures) == (0, ())
    assert check.codes + check.island_codes > 20 * 12
    check_in_onnx_runtime(quantized, graph)


@pytest.mark.parametrize("name", others_long(["vit", "encoder"], ["vit"]))
def test_attention_products_are_quantized_by_a_rule_and_the_model_trains(name):
    run = trained(name, ATTENTION)
    check_training(run)
    rows = [row for row in run.quantized.table() if row.kind == "attention"]
    assert len(rows) == ZOO[name].float_pairs
    assert all((r.weight_bits, r.act_bits, r.float_reason) == (8, 8, None) for r in rows)
    assert not any(row.float_reason for row in run.quantized.table())
    graph = run.quantized.convert()
    assert sum(isinstance(node, g.MatMul) for node in graph.nodes) == len(rows)
    assert not any(op.operation == "dot" for op in graph.float_ops)
    check = run.quantized.verify(graph)
    assert (check.differing, check.failures) == (0, ())
    check_in_onnx_runtime(run.quantized, graph)


# Bits of weights and inputs, of layers inside and at the edge.
RECIPES = {
    "int8_dynamic": ((8, 8), (8, 8)),
    "w4a4_lsq": ((4, 4), (8, 8)),
    "w4a8": ((4, 8), (4, 8)),
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("cnn", "w4a4_lsq"), ("cnn", "int8_dynamic"), ("encoder", "w4a4_lsq")),
        pytest.param("encoder", "w4a8", marks=pytest.mark.long),
    ],
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
