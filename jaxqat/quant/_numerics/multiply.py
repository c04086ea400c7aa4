"""The integer product of codes, with the gradients of the float product."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from jaxqat.quant._numerics import injection
from jaxqat.quant._numerics.activations import dequantize
from jaxqat.quant._numerics.first_order import first_order
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._numerics.grouped import GroupedDot
from jaxqat.quant._numerics.products import AnyProduct, backward
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant._numerics.weights import WeightQuantizer, weight_gradients


@dataclasses.dataclass(frozen=True, eq=False)
class ProductQuantizer(WeightQuantizer):
    """A product, and the quantizer of its weights."""

    product: AnyProduct

    @property
    def grouped(self) -> bool:
        """Whether it sums groups of inputs that have scales of their own."""
        return isinstance(self.product, GroupedDot)

    def split(self, weights: Array) -> Array:
        product = self.product
        return product.split_weights(weights) if isinstance(product, GroupedDot) else weights

    def injected(
        self, weights: Array, step_size: Array | None, noise: Array | None
    ) -> injection.Weights:
        """Return the weights as AQT takes them, in the shape in which they are quantized.

        AQT quantizes by its own calibration where it has one ('absmax'). All other codes are made
        by `quantize`: AQT has no learned step sizes, and multiplies by 1 / scale.
        """
        values = self.split(jnp.asarray(weights, jnp.float32))  # AQT refuses NumPy arrays.
        if self.settings.weight_range == "absmax" and noise is None:
            return injection.to_quantize(values, self.bits, self.axes, injection.AbsMax)
        codes, scale = self.quantize(weights, step_size, noise)
        return injection.quantized_already(values, self.split(codes), scale)

    def per_channel(self, scale: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Return scales of weights of this shape, as they broadcast over the sums."""
        if self.grouped:
            return self.product.over_output(scale)
        summed = self.product.channel_axes
        channels = [1 if axis in summed else n for axis, n in enumerate(shape)]
        return self.product.over_output(jnp.broadcast_to(scale, channels))


class MultiplyResult(NamedTuple):
    """Result of an integer product, y = s_x weight_scale (total + correction); see `multiply`.

    Attributes:
        real: The result y, which has the gradients.
        total: sum(q k), the accumulator, int32; the first axis is that of groups, if there are any.
        correction: -z sum(k), int32, broadcastable to the result.
        weight_scale: s_w, broadcastable to the result.
        weight_codes: k, in the weights' shape.
    """

    real: Array
    total: Int[Array, "..."]
    correction: Int[Array, "..."]
    weight_scale: Float[Array, "..."]
    weight_codes: Int8[Array, "..."]


def multiply(
    quantizer: ProductQuantizer,
    x: Float[Array, "..."],
    codes: Int8[Array, "..."],
    grid: Grid,
    weights: Float[Array, "..."],
    step_size: Float[Array, "..."] | None = None,
    noise: Float[Array, "..."] | None = None,
) -> MultiplyResult:
    """Multiply codes, with straight-through gradients.

    y = s_x s_w (sum(q k) - z sum(k)) with the codes q of the activations and k of the weights
    (Jacob et al. 2018, arXiv:1712.05877, equation 7). The gradients are those of the float
    product at the dequantized operands. The backward pass recomputes these from int8 codes: only
    codes are stored, not float values.

    Args:
        quantizer: The product and the quantizer of its weights.
        x: Dequantized activations: the gradient's path, not read in the forward pass.
        codes: Codes of the activations.
        grid: Their grid; each example may have its own scale.
        weights: Float weights.
        step_size: Their learned scales, under 'lsq'.
        noise: For their stochastic rounding; None rounds to the nearest code.
    """
    result: Any = _multiply(quantizer, x, codes, grid, weights, step_size, noise)
    return MultiplyResult(*result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(quantizer, x, codes, grid, weights, step_size, noise):
    del x
    return _multiply_forward(quantizer, None, codes, grid, weights, step_size, noise)[0]


@default_promotion
def _multiply_forward(quantizer, x, codes, grid, weights, step_size, noise):
    weights = first_order(weights)
    largest = max(-grid.low, grid.high) * 2 ** (quantizer.bits - 1)
    injected = quantizer.injected(weights, step_size, noise)
    total, weight_codes, weight_scale = quantizer.product.inject(codes, injected, largest)
    weight_codes = weight_codes.reshape(weights.shape)
    if grid.zero_point is None:
        correction = jnp.zeros((), jnp.int32)
    else:
        sums = quantizer.product.zero_sums(codes.shape, weight_codes)
        correction = -grid.zero_point * sums
    per_channel = quantizer.per_channel(weight_scale, weights.shape)
    sums = (total + correction).astype(jnp.float32)
    data_scale = quantizer.product.data_over_output(grid.scale) if grid.scale.ndim else grid.scale
    real = sums * (data_scale * per_channel)
    real = (jnp.sum(real, axis=0) if quantizer.grouped else real).astype(quantizer.dtype)
    # Empty arrays carry the types of the two gradients to the backward pass.
    like = (None if x is None else x[..., :0], weights[..., :0])
    clipped = None if quantizer.settings.weight_range == "absmax" else weights
    residuals = (codes, grid, weight_codes, weight_scale, clipped, like)
    return (real, total, correction, per_channel, weight_codes), residuals


@default_promotion
def _multiply_backward(quantizer, residuals, gradients):
    codes, grid, weight_codes, weight_scale, clipped, (x_like, weights_like) = residuals
    x = dequantize(codes, grid, x_like.dtype)
    weights = quantizer.dequantize(weight_codes, weight_scale).astype(x.dtype)
    gradient_x, gradient_weights = backward(quantizer.product, x, weights, gradients[0])
    gradient_weights, gradient_step_size = weight_gradients(
        quantizer, clipped, weight_codes, weight_scale, gradient_weights
    )
    gradient_weights = gradient_weights.astype(weights_like.dtype)
    return gradient_x, None, None, gradient_weights, gradient_step_size, None


_multiply.defvjp(_multiply_forward, _multiply_backward)
