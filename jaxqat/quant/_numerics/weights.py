"""Weights on integer grids: codes, scales, and the gradients of both."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxqat.quant._numerics import estimators as estimate
from jaxqat.quant.recipe import Settings


def quantize_weights(
    weights: Float[Array, "..."],
    settings: Settings,
    axes: tuple[int, ...],
    step: Float[Array, "..."] | None = None,
    noise: Float[Array, "..."] | None = None,
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Codes and scales of weights: code = clip(round(w / scale), -top, top), top = 2**(bits-1) - 1.

    By `Settings.weight_range` the scale is max|w| / top ('absmax'), less
    (`estimate.weight_scale`), or a learned step size.

    Args:
        weights: Any float tensor.
        settings: Bits and estimator.
        axes: Axes that share one scale.
        step: The learned scales, under 'lsq'.
        noise: What stochastic rounding adds before it rounds, uniform in [-1/2, 1/2).

    Returns:
        int8 codes, and float32 scales of the weights' rank with `axes` reduced to 1. All-zero
        weights get a positive scale and the codes 0.
    """
    assert settings.weight_bits is not None
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    if settings.weight_range == "absmax":
        codes, scale = estimate.absmax(weights, settings.weight_bits, axes)
        if noise is None:
            return codes, scale
    elif step is not None:
        scale = jax.lax.stop_gradient(step)
    else:
        scale = estimate.weight_scale(weights, settings, axes)
    top = 2 ** (settings.weight_bits - 1) - 1
    steps = weights / scale if noise is None else weights / scale + noise
    return jnp.clip(jnp.round(steps), -top, top).astype(jnp.int8), scale


def _weight_gradients(how: "QuantizedWeights", weights, codes, scale, gradient):
    """Gradients of weights and of their learned step sizes, given that of the dequantized weights.

    As for activations (`quantize`): straight-through where a weight was not clipped.
    """
    settings, axes = how.settings, how.axes
    if settings.weight_range == "absmax":  # Nothing is clipped.
        return gradient, None
    shape = gradient.shape
    weights, codes, gradient = map(how.split, (weights, codes, gradient))
    top = 2 ** ((settings.weight_bits or 8) - 1) - 1
    steps = weights.astype(jnp.float32) / scale
    kept = jnp.abs(jnp.round(steps)) <= top
    if settings.weight_range != "lsq":
        return jnp.where(kept, gradient, 0).reshape(shape), None
    slope = jnp.where(kept, codes - steps, codes)
    share = 1 / math.sqrt(math.prod(weights.shape[axis] for axis in axes) * top)
    of_step = jnp.sum(gradient.astype(jnp.float32) * slope, axis=axes, keepdims=True) * share
    return jnp.where(kept, gradient, 0), of_step


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """How weights are quantized.

    Attributes:
        settings: Bits and estimator.
        axes: Axes that share one scale.
        dtype: Type of the result.
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
        """The weights in the shape in which they are quantized."""
        return weights

    def quantize(
        self, weights: Array, step: Array | None, noise: Array | None = None
    ) -> tuple[Array, Array]:
        """Codes of the weights, as they lie, and scales for `split` weights."""
        noise = None if noise is None else self.split(noise)
        codes, scale = quantize_weights(self.split(weights), self.settings, self.axes, step, noise)
        return codes.reshape(weights.shape), scale

    def dequantize(self, codes: Array, scale: Array) -> Float[Array, "..."]:
        """The real values of codes."""
        return (self.split(codes).astype(jnp.float32) * scale).reshape(codes.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up_weights(how: QuantizedWeights, weights: Array, step: Array | None) -> Array:
    """Weights on their grid, dequantized, with straight-through gradients."""
    return _look_up_forward(how, weights, step)[0]


def _look_up_forward(how, weights, step):
    codes, scale = how.quantize(weights, step)
    return how.dequantize(codes, scale).astype(how.dtype), (weights, codes, scale)


def _look_up_backward(how, kept, gradient):
    weights, codes, scale = kept
    gradient, of_step = _weight_gradients(how, weights, codes, scale, gradient)
    return gradient.astype(weights.dtype), of_step


look_up_weights.defvjp(_look_up_forward, _look_up_backward)
