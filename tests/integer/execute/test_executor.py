"""Every platform computes the same integers as the NumPy interpreter (`references.integer_graph`).

Here all platforms run on the CPU, with interpreted Pallas kernels; `tests/lowering` compiles them
for their own devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer import graphs, models
from integer.models import MODELS, assert_same, inputs, trained
from plain import others_long
from references import integer_graph

from jaxqat import ExecutionError, make_executor
from jaxqat.integer import graph as g
from jaxqat.integer._execute import PallasCuda
from jaxqat.integer._execute.cpu import mixed_dot
from jaxqat.integer._execute.executor import PLATFORMS

pytestmark = pytest.mark.slow

RECIPES = ["int8", "int8_symmetric"]
EXACT = ["cpu", "tpu", "cuda"]


class Interpreted(PallasCuda):
    """`PallasCuda` with kernels that run as JAX operations."""

    interpret = True


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setitem(PLATFORMS, "cuda_pallas", Interpreted)


def run(graph, platform, images):
    network = make_executor(graph, platform=platform)
    return network.codes(images), network(images)


@pytest.mark.parametrize("recipe", others_long(RECIPES, ["int8"]))
@pytest.mark.parametrize("name", MODELS)
def test_converted_models_give_the_codes_of_the_reference(name, recipe):
    graph = trained(MODELS[name], recipe).convert()
    images = inputs(5, seed=1)
    expected = integer_graph.run(graph, images)
    assert_same(run(graph, "cpu", images), expected)
    if recipe == "int8":
        # The other platforms share all code except products, so one of them is enough.
        other = ("tpu", "cuda")[list(MODELS).index(name) % 2]
        assert_same((make_executor(graph, platform=other).codes(images), 0), (expected[0], 0))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("case", ["residual", "concat", "moves"])
def test_fixed_point_gives_the_codes_of_the_reference(case, platform):
    graph = graphs.build(case, requantization="fixed_point")
    images = graphs.pixels(graph, 5)
    expected = integer_graph.run(graph, images)
    assert_same(run(graph, platform, images), expected)
    assert graph.requantization == "fixed_point"


@pytest.mark.parametrize("requantization", ["float", "fixed_point"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "cuda_pallas"])
def test_a_nan_in_the_input_gets_the_code_of_zero(platform, requantization):
    graph = graphs.build("residual", requantization=requantization)
    images = graphs.normalized(graphs.pixels(graph, 3))
    zeros = images.copy()
    images[1, 2, 3], zeros[1, 2, 3] = np.nan, 0
    assert graph.tensors[graph.quantize.output].zero_point != 0
    found = run(graph, platform, images)
    assert_same(found, run(graph, platform, zeros), every=False)
    assert_same(found, integer_graph.run(graph, images), every=False)


@pytest.mark.parametrize("recipe", others_long(RECIPES, ["int8"]))
@pytest.mark.parametrize("case", ["residual", "depthwise", "concat"])
def test_pallas_kernels_give_the_codes_of_the_reference(case, recipe):
    graph = graphs.build(case, symmetric=recipe == "int8_symmetric")
    images = graphs.pixels(graph, 5)
    assert_same(run(graph, "cuda_pallas", images), integer_graph.run(graph, images), every=False)


def test_pallas_omits_only_the_codes_of_fused_branches():
    graph = graphs.build("residual")
    network = make_executor(graph, platform="cuda_pallas")
    missing = set(graph.tensors) - set(network.codes(graphs.pixels(graph, 1)))
    assert missing == {"block0/conv2/output", "block1/conv2/output"}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_batch_size_makes_no_difference(platform):
    """The CPU splits batches into chunks of 8, and the last chunk may be smaller."""
    graph = graphs.build("chain")
    images = graphs.pixels(graph, 32)
    codes, logits = integer_graph.run(graph, images)
    for batch in (1, 11, 32):
        expected = {name: values[:batch] for name, values in codes.items()}, logits[:batch]
        assert_same(run(graph, platform, images[:batch]), expected)


@pytest.mark.long  # `test_committed` runs a trained one.
def test_resnet18_on_the_cpu_gives_the_codes_of_the_reference():
    images = inputs(5, (16, 16, 3))
    graph = trained(models.resnet18(), "int8_symmetric", images=images).convert((16, 16, 3))
    assert_same(run(graph, "cpu", images), integer_graph.run(graph, images))


@pytest.mark.parametrize("platform", EXACT)
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_int8_however_they_are_stored(symmetric, platform):
    graph = graphs.build("mlp", symmetric=symmetric)
    codes = make_executor(graph, platform=platform).codes(graphs.pixels(graph, 1))
    assert {str(values.dtype) for values in codes.values()} == {"int8"}


@pytest.mark.parametrize("platform", EXACT)
def test_pixels_and_their_normalized_values_give_the_same_result(platform):
    graph = graphs.build("chain", symmetric=platform == "cpu")
    images = graphs.pixels(graph, 3)
    network = make_executor(graph, platform=platform)
    np.testing.assert_array_equal(network(images), network(graphs.normalized(images)))


def test_apply_is_a_pure_function_of_the_parameters():
    graph = graphs.build("mlp")
    images = graphs.pixels(graph, 2)
    network = make_executor(graph, platform="tpu")
    zeros = jax.tree.map(np.zeros_like, network.parameters)
    apply = jax.jit(network.apply, compiler_options=network.compiler_options)
    np.testing.assert_array_equal(apply(network.parameters, images), network(images))
    np.testing.assert_array_equal(apply(zeros, images), 0 * np.asarray(network(images)))


# Sums beyond the exact integers of float32.


def extremes(kind: Any, shape, weights, *, symmetric, groups=1):
    """Return a product on images of only the largest and smallest codes, and its exact sums.

    The bias is one minus the sum of the first image, so that an error of one unit in a sum beyond
    2**24 shows in a small result.
    """
    rng = np.random.default_rng(0)
    low, zero = (-127, 0) if symmetric else (-128, -128)
    tensor = g.Tensor(
        name="x", shape=shape, scale=np.float32(1), zero_point=zero, low=low, high=127
    )
    images = rng.choice(np.array([low - zero, 127 - zero]), (4, *shape))
    images[0], images[1] = 127 - zero, low - zero
    images[0].flat[::7] -= 1  # Sums of all parities.
    options: dict[str, Any] = {}
    if kind == "conv":
        rank = len(shape) - 1
        options = {"strides": (1,) * rank, "padding": ((0, 0),) * rank, "dilation": (1,) * rank}
        options["groups"] = groups
    ones = np.ones(weights.shape[-1], np.float32)
    zeros = np.zeros(weights.shape[-1], np.int32)
    node = g.Product(
        name="wide", inputs=("x",), output="y", kind=kind, weights=weights, bias=zeros,
        multiplier=ones, weight_scale=ones, **options,
    )  # fmt: skip
    sums = integer_graph.product(node, images)
    bias = (1 - sums[0].reshape(-1, weights.shape[-1])[0]).astype(np.int32)
    quantize = g.Quantize(name="q", inputs=(g.INPUT,), output="x", inverse=np.float32(1))
    graph = g.IntegerGraph(
        inputs=(g.Input(shape=shape),), tensors={"x": tensor},
        outputs=(g.Output(name="y", shape=sums.shape[1:]),),
        nodes=(quantize, dataclasses.replace(node, bias=bias)),
    )  # fmt: skip
    return graph, images.astype(np.float32), sums, sums + bias


def extreme_weights(*shape):
    """Return weights of the largest magnitude: all positive, all negative, and mixed channels."""
    weights = np.random.default_rng(1).choice(np.array([-127, 127], np.int8), shape)
    weights[..., 0], weights[..., 1] = 127, -127
    return weights


WIDE = {
    "dense": ("dense", (1600,), extreme_weights(1600, 4)),
    "conv": ("conv", (3, 4, 180), extreme_weights(3, 3, 180, 4)),
    "groups": ("conv", (3, 3, 320), extreme_weights(3, 3, 160, 4), 2),
    "one pixel": ("conv", (2, 2, 1604), extreme_weights(1, 1, 1604, 4)),
    # Four input channels cannot be split.
    "window": ("conv", (300, 4), extreme_weights(261, 4, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("platform", [*EXACT, "cuda_pallas"])
@pytest.mark.parametrize("name", WIDE)
def test_sums_beyond_float32_are_exact(name, platform, symmetric):
    kind, shape, weights, *groups = WIDE[name]
    groups = groups[0] if groups else 1
    graph, images, sums, totals = extremes(kind, shape, weights, symmetric=symmetric, groups=groups)
    assert np.abs(sums[0]).max() > 2**24
    result = np.asarray(make_executor(graph, platform=platform)(images))
    assert (result[0].reshape(-1, weights.shape[-1])[0] == 1).all()
    np.testing.assert_array_equal(result, totals.astype(np.float32))


@pytest.mark.parametrize("terms", [1, 3, 64, 1000, 66_000])
def test_mixed_products_are_exact_at_the_ends_of_u8_and_s8(terms):
    """Kernels without VNNI add pairs of products in int16, which 2 * 255 * 127 overflows."""
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([0, 127, 128, 255], np.uint8), (3, terms))
    codes[0], codes[1] = 255, rng.integers(0, 256, terms)
    weights = rng.choice(np.array([-128, -127, 127], np.int8), (terms, 4))
    weights[:, 0], weights[:, 1] = 127, -127
    expected = codes.astype(np.int64) @ weights.astype(np.int64)
    assert terms < 66_000 or np.abs(expected).max() > 2**30
    result = jax.jit(mixed_dot)(codes, weights)
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, expected)


# Errors.


def test_images_of_another_shape_raise_an_error():
    network = make_executor(graphs.build("mlp"), platform="tpu")
    for shape in ((2, 4, 4, 3), (4, 4, 2), (2, 32), (2,)):
        given = ", ".join(map(str, shape))
        with pytest.raises(ExecutionError, match=rf"shape \(batch, 4, 4, 2\), got \({given},?\)"):
            network(np.zeros(shape, np.float32))
        with pytest.raises(ExecutionError, match="shape"):
            network.codes(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, bool, np.complex64])
def test_images_of_another_type_raise_an_error(dtype):
    network = make_executor(graphs.build("mlp"), platform="tpu")
    with pytest.raises(ExecutionError, match=f"float32 or uint8, got {np.dtype(dtype).name}"):
        network(np.zeros((1, 4, 4, 2), dtype))


def test_pixels_for_a_network_without_a_table_raise_an_error_with_both_fixes():
    graph = graphs.build("mlp")
    bare = dataclasses.replace(graph.quantize, table=None)
    nodes = tuple(bare if isinstance(n, g.Quantize) else n for n in graph.nodes)
    network = make_executor(dataclasses.replace(graph, nodes=nodes), platform="tpu")
    with pytest.raises(ExecutionError, match=r"give the model's float32 input, or convert with"):
        network(graphs.pixels(graph, 1))


def test_an_unknown_platform_raises_an_error_that_lists_the_known_ones():
    with pytest.raises(ExecutionError) as error:
        make_executor(graphs.build("mlp"), platform="npu")
    assert all(name in str(error.value) for name in (*PLATFORMS, "'npu'"))


def test_nested_lists_are_valid_images():
    graph = graphs.build("mlp")
    network = make_executor(graph, platform="tpu")
    images = graphs.normalized(graphs.pixels(graph, 1))
    np.testing.assert_array_equal(network(images.tolist()), network(images))
