"""The converted ResNet-18 at full width runs on integer kernels on every target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering.assertions import assert_integer_network
from lowering.functions import shape
from lowering.targets import for_targets
from plain import others_long

from jaxqat import quantize
from jaxqat.integer._convert.convert import convert
from jaxqat.integer._execute.executor import make_executor
from jaxqat.lowering import kernels
from jaxqat.pipeline.models import ModelConfig, build_model

WIDTH, BATCH = 64, 64
PRODUCTS = 20 + 1
SMALLEST = BATCH * 4 * 4 * 8 * WIDTH  # The last stage's activations.

# By target: the executor's lowering, and whether it writes only codes.
EXACT = {
    "cpu": ("cpu", False),
    "sm_75": ("cuda", False),
    "sm_80": ("cuda", False),
    "sm_90": ("cuda", False),
    "tpu_v5e": ("tpu", True),
}
FUSED = {"sm_80": ("cuda_pallas", True), "sm_90": ("cuda_pallas", True)}


@functools.cache
def resnet18(recipe: str):
    """Return an integer ResNet-18 with random weights and the ranges of tensors after ReLU.

    Its kernels depend on shapes and grids, but not on training.
    """
    model = quantize(build_model(ModelConfig(width=WIDTH), num_classes=10), recipe)
    images = jnp.zeros((1, 32, 32, 3))
    init = functools.partial(model.module.init, train=False)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: np.abs(rng.normal(size=leaf.shape) + 0.1).astype(leaf.dtype),
        jax.eval_shape(init, jax.random.key(0), images),
    )
    variables["params"] = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), variables["params"]
    )
    ranges = model.init_quant(variables, images, train=False)["quant"]
    values = {"min": np.float32(0), "max": np.float32(3), "count": np.int32(1)}
    ranges = jax.tree.map_with_path(lambda path, _: values[path[-1].key], ranges)
    ranges["stem_conv"]["input"]["min"] = np.float32(-3)
    return convert(
        model,
        {**variables, "quant": ranges},
        images,
        train=False,
        preprocess=lambda pixels: (pixels / 255 - 0.5) / 0.2,
    )


def compiled(target, recipe, lowering, fused):
    network = make_executor(resnet18(recipe), platform=lowering)
    return assert_integer_network(
        target,
        jax.jit(network.apply, compiler_options=network.compiler_options),
        network.parameters,
        shape(BATCH, 32, 32, 3, dtype=jnp.uint8),
        products=PRODUCTS,
        smallest=SMALLEST,
        fused=fused,
    )


@pytest.mark.slow
@for_targets(EXACT)
@pytest.mark.parametrize("recipe", others_long(["int8", "int8_symmetric"], ["int8"]))
def test_the_exact_network_multiplies_s8_codes_on_integer_kernels_only(target, recipe):
    compiled(target, recipe, *EXACT[target.name])


@pytest.mark.slow
@for_targets(FUSED)
@pytest.mark.parametrize("recipe", ["int8", "int8_symmetric"])
def test_pallas_kernels_write_codes_only(target, recipe):
    found = kernels(compiled(target, recipe, *FUSED[target.name]).text)
    assert {"Pallas"} <= {product.engine for kernel in found for product in kernel.products}
