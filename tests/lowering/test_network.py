"""A hand-written integer network on every platform, and tests of the assertions."""

import jax
import jax.numpy as jnp
import pytest
from lowering.assertions import (
    assert_activations_are_codes,
    assert_integer_network,
    assert_products_are_integer,
    float_activations,
)
from lowering.functions import CASES, F32, shape
from lowering.networks import CONVOLUTIONS, network, network_shapes
from lowering.targets import GPUS, TPUS, for_targets, on_all

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
