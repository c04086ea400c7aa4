# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The table of a network's uint8 images: the code of each pixel value."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxqat.errors import ConversionError
from jaxqat.integer import graph as g
from jaxqat.quant._forms.exact import scaled
from jaxqat.quant._numerics.promotion import default_promotion


def with_tables(
    nodes: Sequence[g.Node],
    inputs: Sequence[g.Input],
    tensors: dict[str, g.Tensor],
    preprocess: Callable[[jax.Array], jax.Array],
) -> list[g.Node]:
    """Return nodes, with the table of `preprocess` where they quantize the input.

    Raises:
        ConversionError: The model has several inputs, or does not quantize float images at once; or
            `preprocess` looks at more than a value and its channel.
    """
    if len(inputs) != 1:
        raise ConversionError(
            f"preprocess makes one input of images, and this model has {len(inputs)}: convert "
            "without it."
        )
    (each,) = inputs
    if each.type != "float32":
        raise ConversionError(
            f"preprocess makes the model's float32 input of images, and this model takes "
            f"{each.type} itself: convert without it."
        )
    readers = [node for node in nodes if each.name in node.inputs]
    if not all(isinstance(node, g.Quantize) for node in readers):
        raise ConversionError(
            "preprocess needs a model whose input is quantized at once, and this one computes "
            "with it in float first. Convert without preprocess and give the network the "
            "model's own input."
        )
    return [
        _with_table(node, tensors, preprocess)
        if isinstance(node, g.Quantize) and each.name in node.inputs
        else node
        for node in nodes
    ]


def _with_table(
    node: g.Quantize, tensors: dict[str, g.Tensor], preprocess: Callable[[jax.Array], jax.Array]
) -> g.Quantize:
    tensor = tensors[node.output]

    @default_promotion
    def rounded(values: jax.Array, inverse: jax.Array) -> jax.Array:
        real = values.astype(jnp.float32)
        if node.coefficients:
            real = scaled(real, *node.coefficients.values())
        units = jnp.round(real * inverse)
        units = jnp.where(jnp.isnan(units), np.float32(0), units)  # As an executor does.
        return jnp.clip(units + tensor.zero_point, tensor.low, tensor.high).astype(jnp.int8)

    @jax.jit
    def codes(images: jax.Array, inverse: jax.Array) -> jax.Array:
        return rounded(preprocess(images), inverse)

    channels = tensor.shape[-1]
    shape = (256, *(1,) * (len(tensor.shape) - 1), channels)
    values = jnp.broadcast_to(
        jnp.arange(256, dtype=jnp.uint8).reshape(256, *(1,) * len(tensor.shape)), shape
    )
    table = np.asarray(codes(values, node.inverse))
    if table.shape != shape:
        raise _not_pointwise(f"It makes the shape {table.shape} of {shape}")
    table = table.reshape(256, channels)
    images = _random_images(tensor.shape)
    wanted, found = codes(jnp.asarray(images), node.inverse), table[images, np.arange(channels)]
    differing = int((np.asarray(wanted) != found).sum())
    if differing:
        raise _not_pointwise(f"On random images, {differing:,} of {images.size:,} codes differ")
    return dataclasses.replace(node, table=table)


def _not_pointwise(observation: str) -> ConversionError:
    return ConversionError(
        "preprocess must compute each value from the uint8 value in its place and its channel "
        f"alone, as (x / 255 - mean) / std does. {observation}: it looks at other values "
        "(standardization of each image) or at the place (subtraction of a mean image). Convert "
        "without preprocess and give the network float images."
    )


def _random_images(shape: tuple[int, ...]) -> np.ndarray:
    """Return two images of all values and two of little contrast, a dark and a bright one."""
    bounds = ((0, 256), (0, 256), (10, 60), (180, 230))
    random = np.random.default_rng(0)
    return np.stack([random.integers(*ends, shape) for ends in bounds]).astype(np.uint8)
