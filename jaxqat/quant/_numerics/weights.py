"""Weights on integer grids: codes, scales, and the gradients of both."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxqat.quant._numerics import estimators as estimate
from jaxqat.quant._numerics.first_order import first_order
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant.recipe import Settings


def quantize_weights(
    weights: Float[Array, "..."],
    settings: Settings,
    axes: tuple[int, ...],
    step_size: Float[Array, "..."] | None = None,
    noise: Float[Array, "..."] | None = None,
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Return codes and scales: code = clip(round(w / scale), -top, top), top = 2**(bits-1) - 1.

    `Settings.weight_range` decides about the scale: max|w| / top ('absmax'), less than that
    (`estimate.weight_scale`), or a learned step size.

    Args:
        weights: Any float tensor.
        settings: Bits and estimator.
        axes: Axes that share one scale.
        step_size: The learned scales ('lsq').
        noise: Added before rounding, uniform in [-1/2, 1/2), for stochastic rounding.

    Returns:
        int8 codes, and float32 scales in the weights' shape with `axes` reduced to 1. All-zero
        weights get a positive scale and the codes 0.
    """
    assert settings.weight_bits is not None
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    if settings.weight_range == "absmax":
        codes, scale = estimate.absmax(weights, settings.weight_bits, axes)
        if noise is None:
            return codes, scale
    elif step_size is not None:
        scale = jax.lax.stop_gradient(step_size)
    else:
        scale = estimate.weight_scale(weights, settings, axes)
    top = 2 ** (settings.weight_bits - 1) - 1
    units = weights / scale if noise is None else weights / scale + noise
    return jnp.clip(jnp.round(units), -top, top).astype(jnp.int8), scale


def weight_gradients(quantizer: "WeightQuantizer", weights, codes, scale, gradient):
    """Return the gradients of weights and of their learned step sizes.

    Given is the gradient of the dequantized weights. It passes where a weight was not clipped, as
    for activations (`activations.quantize`).
    """
    settings, axes = quantizer.settings, quantizer.axes
    if settings.weight_range == "absmax":  # Nothing is clipped.
        return gradient, None
    shape = gradient.shape
    weights, codes, gradient = map(quantizer.split, (weights, codes, gradient))
    top = 2 ** ((settings.weight_bits or 8) - 1) - 1
    units = weights.astype(jnp.float32) / scale
    kept = jnp.abs(jnp.round(units)) <= top
    if settings.weight_range != "lsq":
        return jnp.where(kept, gradient, 0).reshape(shape), None
    slope = jnp.where(kept, codes - units, codes)
    share = 1 / math.sqrt(math.prod(weights.shape[axis] for axis in axes) * top)
    of_step_size = jnp.sum(gradient.astype(jnp.float32) * slope, axis=axes, keepdims=True) * share
    return jnp.where(kept, gradient, 0), of_step_size


@dataclasses.dataclass(frozen=True, eq=False)
class WeightQuantizer:
    """Quantizes weights.

    Attributes:
        settings: Bits and estimator.
        axes: Axes that share one scale.
        dtype: Type of the dequantized weights, or of their product.
    """

    settings: Settings
    axes: tuple[int, ...]
    dtype: Any

    @property
    def bits(self) -> int:
        """Width of the weight codes."""
        assert self.settings.weight_bits is not None
        return self.settings.weight_bits

    def split(self, weights: Array) -> Array:
        """Return the weights in the shape in which they are quantized."""
        return weights

    def quantize(
        self, weights: Array, step_size: Array | None, noise: Array | None = None
    ) -> tuple[Array, Array]:
        """Return codes in the weights' shape, and scales for `split` weights."""
        noise = None if noise is None else self.split(noise)
        settings, axes = self.settings, self.axes
        codes, scale = quantize_weights(self.split(weights), settings, axes, step_size, noise)
        return codes.reshape(weights.shape), scale

    def dequantize(self, codes: Array, scale: Array) -> Float[Array, "..."]:
        """Return the real values of codes."""
        return (self.split(codes).astype(jnp.float32) * scale).reshape(codes.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dequantized_weights(
    quantizer: WeightQuantizer, weights: Array, step_size: Array | None
) -> Array:
    """Return weights rounded to their grid, with straight-through gradients."""
    return _dequantized_forward(quantizer, weights, step_size)[0]


@default_promotion
def _dequantized_forward(quantizer, weights, step_size):
    weights = first_order(weights)
    codes, scale = quantizer.quantize(weights, step_size)
    values = quantizer.dequantize(codes, scale).astype(quantizer.dtype)
    return values, (weights, codes, scale)


@default_promotion
def _dequantized_backward(quantizer, residuals, gradient):
    weights, codes, scale = residuals
    gradient, of_step_size = weight_gradients(quantizer, weights, codes, scale, gradient)
    return gradient.astype(weights.dtype), of_step_size


dequantized_weights.defvjp(_dequantized_forward, _dequantized_backward)
