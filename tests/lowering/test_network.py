"""A hand-written integer network on every platform, and tests of the assertions."""

import jax
import jax.numpy as jnp
import pytest
from integer import graphs
from lowering.assertions import (
    assert_activations_are_codes,
    assert_integer_network,
    assert_products_are_integer,
    float_activations,
)
from lowering.functions import CASES, F32, shape
from lowering.networks import CONVOLUTIONS, network, network_shapes
from lowering.targets import GPUS, TPUS, for_targets, on_all

from jaxqat.integer import graph as g
from jaxqat.integer._execute.executor import PLATFORMS
from jaxqat.lowering import compile_for, kernels

# A TPU leaves an activation of fewer images in float on the chip, between two fused convolutions.
WIDTH, BATCH, SIZE = 32, 32, 16
SMALLEST = BATCH * (SIZE // 2) ** 2 * 2 * WIDTH
SHAPES = (network_shapes(WIDTH), shape(BATCH, SIZE, SIZE, 4))


@on_all
def test_all_products_of_the_plain_idiom_are_integer_and_tpus_fuse_the_rest(target):
    assert_integer_network(
        target,
        network,
        *SHAPES,
        products=CONVOLUTIONS + 1,
        smallest=SMALLEST,
        fused=target.platform == "tpu",
    )


@on_all
def test_the_scopes_of_the_network_name_its_kernels(target):
    found = kernels(compile_for(target, network, *SHAPES).text)
    layers = [kernel.layer for kernel in found for _ in kernel.products]
    assert sorted(layers) == sorted(["stem"] + ["block0"] * 2 + ["block1"] * 3 + ["head"])


@for_targets(GPUS)
def test_cudnn_writes_each_convolutions_result_in_float(target):
    # The price of exact rounding without a custom kernel.
    found = kernels(compile_for(target, network, *SHAPES).text)
    written = float_activations(found, at_least=SMALLEST)
    assert len(written) == CONVOLUTIONS
    assert {product.engine for kernel, _ in written for product in kernel.products} == {"cuDNN"}


@on_all
def test_one_layer_left_in_float_is_found(target):
    def function(layers, x):
        # Correct codes, but multiplied in bfloat16, a TPU's default.
        real = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layers["head"])
        pooled = x.astype(jnp.bfloat16).mean((1, 2))
        return network(layers, x) + pooled @ jnp.ones((4, 128), jnp.bfloat16) @ jnp.tile(
            real["weights"], (128 // real["weights"].shape[0], 1)
        )

    compiled = compile_for(target, function, *SHAPES)
    with pytest.raises(AssertionError, match="not on integer kernels"):
        assert_products_are_integer(compiled, products=CONVOLUTIONS + 1)


def test_a_missing_product_is_found():
    compiled = compile_for("cpu", network, *SHAPES)
    with pytest.raises(AssertionError, match="7 of 8 products"):
        assert_products_are_integer(compiled, products=CONVOLUTIONS + 2)


def test_an_integer_product_in_a_plain_loop_is_found():
    case = CASES["s8_dot_of_one_row"]
    compiled = compile_for("cpu", case.function, *case.shapes)
    with pytest.raises(AssertionError, match=r"s32\(s8\) x s32\(s8\) -> s32 by XLA"):
        assert_products_are_integer(compiled, products=1)


@for_targets(TPUS)
def test_an_activation_that_is_not_requantized_is_found(target):
    def function(layers, x):
        y = network(layers, x)
        wide = jax.lax.optimization_barrier(jnp.tile(x.astype(F32) * 0.3, (1, 1, 1, WIDTH)))
        return y + wide.sum((1, 2, 3))[:, None]

    compiled = compile_for(target, function, *SHAPES)
    with pytest.raises(AssertionError, match="written between layers"):
        assert_activations_are_codes(compiled, smallest=SMALLEST)


def attention():
    """Return a network with the two products of attention, at each of 256 places."""
    m = graphs.Maker((16, 16, 8))
    places = m.same(g.Move, "places", m.quantize(), kind="reshape", shape=(256, 8))
    heads = {"kind": "reshape", "shape": (256, 2, 64)}
    query, key, value = (
        m.same(g.Move, f"{name}/heads", m.dense(name, places, 128, relu=False), **heads)
        for name in ("query", "key", "value")
    )
    scores = m.mat_mul("scores", query, key, ((3,), (3,)), ((0, 2), (0, 2)))
    mixed = m.mat_mul("mixed", scores, value, ((3,), (1,)), ((0, 1), (0, 2)))
    mixed = m.same(g.Move, "back", mixed, kind="transpose", axes=(0, 2, 1, 3))
    m.head(m.same(g.Move, "flat", mixed, kind="reshape", shape=(256, 128)))
    return m.finish()


@for_targets([*GPUS, *TPUS])
def test_products_of_two_activations_are_integer(target):
    executor = PLATFORMS["tpu" if target.platform == "tpu" else "cuda"](attention())

    def function(parameters, images):
        return executor.result(executor.visit([images], parameters))

    compiled = compile_for(target, function, executor.parameters, shape(8, 16, 16, 8, dtype=F32))
    # A compiler may merge the products that read the same tensor.
    assert_products_are_integer(compiled, products=4)
    found = [p.op_name for kernel in kernels(compiled.text) for p in kernel.products]
    assert any("scores" in name for name in found) and any("mixed" in name for name in found)
