"""The integer product of codes, with the gradients of the float product."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from jaxqat.quant._numerics.activations import dequantize
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._numerics.grouped import GroupedDot
from jaxqat.quant._numerics.products import Product, backward
from jaxqat.quant._numerics.weights import QuantizedWeights, _weight_gradients


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedProduct(QuantizedWeights):
    """A product, convolution or dot, and how its weights are quantized."""

    product: Product

    @property
    def grouped(self) -> bool:
        """Whether its result is a sum over groups of inputs."""
        return isinstance(self.product, GroupedDot)

    def split(self, weights: Array) -> Array:
        product = self.product
        return product.split_weights(weights) if isinstance(product, GroupedDot) else weights

    def per_channel(self, scale: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Scales of weights of this shape, as they spread over the sums."""
        if self.grouped:
            return self.product.over_output(scale)
        summed = self.product.channel_axes
        channels = [1 if axis in summed else n for axis, n in enumerate(shape)]
        return self.product.over_output(jnp.broadcast_to(scale, channels))


class ProductResult(NamedTuple):
    """What an integer product gives: y = scale * (total + correction), see `multiply`.

    Attributes:
        real: The result y, which carries the gradients.
        total: sum(q k), the accumulator, int32; with groups of inputs one for each, first axis.
        correction: -z sum(k), int32, broadcastable to the result.
        weight_scale: s_w, broadcastable to the result.
        weight_codes: k, as the weights lie.
    """

    real: Array
    total: Int[Array, "..."]
    correction: Int[Array, "..."]
    weight_scale: Float[Array, "..."]
    weight_codes: Int8[Array, "..."]


def multiply(
    how: QuantizedProduct,
    x: Float[Array, "..."],
    codes: Int8[Array, "..."],
    grid: Grid,
    weights: Float[Array, "..."],
    step: Float[Array, "..."] | None = None,
    noise: Float[Array, "..."] | None = None,
) -> ProductResult:
    """An integer product with straight-through gradients.

    y = s_x s_w (sum(q k) - z sum(k)) with the codes q of the activations and k of the weights
    (Jacob et al. 2018, arXiv:1712.05877, equation 7). The gradients are those of the float
    product at the dequantized operands, which the backward pass makes anew from int8 codes.

    Args:
        how: The product and the quantization of its weights.
        x: Dequantized activations: the path of the gradient, not read in the forward pass.
        codes: Codes of the activations.
        grid: Their grid; its scale may be one an example.
        weights: Float weights; quantized here.
        step: Their learned scales, if the settings say so.
        noise: Of their stochastic rounding, if they are rounded so.
    """
    result: Any = _multiply(how, x, codes, grid, weights, step, noise)
    return ProductResult(*result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(how, x, codes, grid, weights, step, noise):
    del x
    return _multiply_forward(how, None, codes, grid, weights, step, noise)[0]


def _multiply_forward(how, x, codes, grid, weights, step, noise):
    weight_codes, weight_scale = how.quantize(weights, step, noise)
    total = how.product.accumulate(codes, weight_codes)
    if grid.zero_point is None:
        correction = jnp.zeros((), jnp.int32)
    else:
        sums = how.product.zero_sums(codes.shape, weight_codes)
        correction = -grid.zero_point * sums
    per_channel = how.per_channel(weight_scale, weights.shape)
    sums = (total + correction).astype(jnp.float32)
    data_scale = how.product.data_over_output(grid.scale) if grid.scale.ndim else grid.scale
    real = sums * (data_scale * per_channel)
    real = (jnp.sum(real, axis=0) if how.grouped else real).astype(how.dtype)
    # Empty arrays carry the types of the two gradients to the backward pass.
    like = (None if x is None else x[..., :0], weights[..., :0])
    clipped = None if how.settings.weight_range == "absmax" else weights
    kept = (codes, grid, weight_codes, weight_scale, clipped, like)
    return (real, total, correction, per_channel, weight_codes), kept


def _multiply_backward(how, kept, gradients):
    codes, grid, weight_codes, weight_scale, clipped, (x_like, weights_like) = kept
    x = dequantize(codes, grid, x_like.dtype)
    weights = how.dequantize(weight_codes, weight_scale).astype(x.dtype)
    gradient_x, gradient_weights = backward(how.product, x, weights, gradients[0])
    gradient_weights, gradient_step = _weight_gradients(
        how, clipped, weight_codes, weight_scale, gradient_weights
    )
    gradient_weights = gradient_weights.astype(weights_like.dtype)
    return gradient_x, None, None, gradient_weights, gradient_step, None


_multiply.defvjp(_multiply_forward, _multiply_backward)
