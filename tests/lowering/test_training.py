"""The training step of QAT multiplies s8 codes in the forward pass on every target."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from lowering.assertions import is_backward, is_proper
from lowering.functions import F32, shape
from lowering.targets import GPUS, TPUS, for_targets

from jaxqat import quantize
from jaxqat.lowering import compile_for, kernels, products
from jaxqat.pipeline.data import augment, normalize
from jaxqat.pipeline.models import ModelConfig, build_model
from jaxqat.pipeline.training import Data, init_state, make_step

CLASSES = 10
# By platform, width and batch. On two cores the GPU's compiler takes some ten seconds at any width,
# the TPU's half a minute at width 8 and seven minutes at 64. No layer has as many channels, rows or
# columns as the batch has images: a result with this extent is one of the batch.
SIZES = {"cuda": (64, 120), "tpu": (8, 24)}
CONVOLUTIONS, DENSE = 20, 1
# On CUDA, the layers with 128, 256 and 512 inputs are split into 2, 3 and 5 convolutions of at most
# 112 inputs, whose sums are exact in float32: 9 * 112 * 128 * 128 < 2**24. In the four stages, with
# the stem and the projections: 5, 1 + 3 * 2 + 1, 2 + 3 * 3 + 1, 3 + 3 * 5 + 1.
PARTS = {"cuda": 5 + 8 + 12 + 19, "tpu": CONVOLUTIONS}


def training_step(recipe: str, width: int, batch: int):
    """The step of `jaxqat train` for a ResNet-18, jitted, and its arguments as shapes."""
    model = quantize(build_model(ModelConfig(width=width), CLASSES), recipe)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def forward(params, collections, images, key):
        variables = {"params": params, **collections}
        logits, updates = model.apply(variables, images, train=True, mutable=list(collections))
        return logits, {**collections, **updates}

    def prepare(key, images):
        images = augment(key, images, crop_padding=4, flip=True)
        return normalize(images, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))

    def start(key):
        image = jnp.zeros((1, 32, 32, 3))
        variables = model.init(key, image, train=False)
        variables = dict(model.init_quant(variables, image, train=False))
        return init_state(variables.pop("params"), variables, optimizer)

    step = make_step(
        forward=forward,
        prepare=prepare,
        optimizer=optimizer,
        batch_size=batch,
        steps_per_epoch=3,
        label_smoothing=0.0,
    )
    state = jax.eval_shape(start, jax.random.key(0))
    images = 3 * batch
    data = Data(shape(images, 32, 32, 3, dtype=jnp.uint8), shape(images, dtype=jnp.int32))
    order, key = shape(images, dtype=jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(step, donate_argnums=0), (state, data, order, key)


@pytest.mark.slow
@for_targets((*GPUS, TPUS[0]))
@pytest.mark.parametrize("recipe", ["int8", "int8_symmetric"])
def test_every_forward_product_of_the_qat_step_multiplies_codes(target, recipe):
    width, batch = SIZES[target.platform]
    step, arguments = training_step(recipe, width, batch)
    found = products(kernels(compile_for(target, step, *arguments).text))
    forward = [product for product in found if not is_backward(product)]
    assert [product.types for product in forward if not is_proper(product)] == []

    # Products of the batch; the affine recipe also sums, once, the weights at the borders.
    of_the_batch = [product for product in forward if batch in product.result.dims]
    kinds = [product.kind for product in of_the_batch]
    assert (kinds.count("convolution"), kinds.count("dot")) == (PARTS[target.platform], DENSE)
    # Gradients of both operands, except for the images.
    backward = [product for product in found if is_backward(product)]
    assert len(backward) == 2 * (CONVOLUTIONS + DENSE) - 1
    assert all(not product.is_integer for product in backward)


@for_targets(("cpu",))
def test_a_step_that_only_simulates_codes_has_no_integer_products(target):
    @functools.partial(jax.jit)
    def step(w, x):
        # Quantized and dequantized in float32, as most libraries train.
        def loss(w):
            codes = w + jax.lax.stop_gradient(jnp.round(w * 64) / 64 - w)
            return jnp.tanh(x @ codes).sum()

        return jax.grad(loss)(w)

    compiled = compile_for(target, step, shape(64, 64, dtype=F32), shape(64, 64, dtype=F32))
    found = products(kernels(compiled.text))
    assert [is_backward(product) for product in found] == [False, True]
    assert not any(product.is_integer for product in found)
