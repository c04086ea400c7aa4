"""The differentiable integer operations: quantize a tensor, multiply codes.

Forward passes run on integers. Backward passes are straight-through (Bengio et al. 2013,
arXiv:1308.3432): rounding has the derivative 1, and a value that was clipped gets the gradient 0.
What is kept for them is int8: the codes of both operands, not their float values. AQT quantizes
(its scaling, its absmax calibration, its numerics as an extension point); the products are ours,
since AQT's convolution has no gradient and multiplies in floating point.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_quantizer
from aqt.jax.v2 import utils as aqt_utils
from aqt.jax.v2.numerics import numerics as aqt_numerics
from jaxtyping import Array, Float, Int, Int8

from jaxqat.quant import estimate
from jaxqat.quant.grouped import GroupedDot
from jaxqat.quant.products import Product, backward
from jaxqat.quant.ranges import Grid, GridCalibration
from jaxqat.quant.recipe import Settings

# AQT builds its dataclasses with a decorator of its own, which type checkers do not see through.
_aqt_dataclass: Any = aqt_utils.flax_slots_kw_only_dataclass
_Quantizer: Any = aqt_quantizer.Quantizer


@_aqt_dataclass
class AffineInt(aqt_numerics.AqtNumerics):
    """AQT numerics with an integer zero point: code = clip(round(u) + z, low, high), u = x / s."""

    zero: Any
    low: int
    high: int

    def get_dtype(self):
        """Type of the codes."""
        return jnp.int8

    def get_quant_bound(self):
        """Steps from the zero point of a symmetric grid to its last code."""
        return self.high

    def vjp_fwd(self, x, context):
        """Codes, and what was not clipped: all that the backward pass needs."""
        del context
        # Added as floats: u may lie beyond int32, and below 2**24 the sum is exact.
        codes = jnp.round(x) + self.zero
        kept = (codes >= self.low) & (codes <= self.high)
        return jnp.clip(codes, self.low, self.high).astype(jnp.int8), kept

    def vjp_bwd(self, res, grad):
        """The gradient where the value was not clipped, 0 where it was."""
        return (jnp.where(res, grad, jnp.zeros_like(grad)), None)


def _numerics(grid: Grid) -> AffineInt:
    return AffineInt(zero=grid.zero, low=grid.low, high=grid.high)


def in_steps(x: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    """A tensor in units of the grid's scale, u = x / scale, before rounding (by AQT's QTensor)."""
    x = x.astype(jnp.float32)
    quantizer = _Quantizer(
        numerics=_numerics(grid),
        calib_shared_axes="per_tensor",
        scale_stop_grad=True,
        calibration=functools.partial(GridCalibration, scale=grid.scale),
        context=estimate.CONTEXT,
    )
    quantizer.init_calibration()
    tensor: Any = quantizer.calibrate(x, calibration_axes=None).quant(x)
    return tensor.qvalue


def dequantize(codes: Int8[Array, "..."], grid: Grid, dtype: Any) -> Float[Array, "..."]:
    """Real values of codes: scale * (code - zero_point), computed in float32."""
    steps = codes.astype(jnp.float32) - grid.zero
    return (steps * grid.scale).astype(dtype)


def quantize(
    x: Float[Array, "..."],
    steps: Float[Array, "..."],
    grid: Grid,
    *,
    learned: Literal["lsq", "pact"] | None = None,
) -> tuple[Float[Array, "..."], Int8[Array, "..."]]:
    """A tensor on a grid: its dequantized value, which carries the gradient, and its codes.

    code = clip(round(u) + z, low, high); the gradient with respect to x is that of the
    dequantized value where low <= round(u) + z <= high, and 0 elsewhere. A learned scale s has
    one too: of a value that was clipped, code - z; of another, code - z - u with 'lsq' (Esser et
    al. 2020, arXiv:1902.08153, equation 3), all of it times 1 / sqrt(N Q_P) with N values an
    example and Q_P codes on the longer side of zero (section 2.2), and 0 with 'pact' (Choi et al.
    2018, arXiv:1805.06085, equation 3, for the bound s Q_P in the place of s). What is clipped is
    told by the rounded value here, by the value itself in both papers.

    Args:
        x: The real tensor; only its gradient path and its type are used, and, for a learned
            scale, its values.
        steps: u, the same tensor in units of the grid's scale (`in_steps`, or the integer form
            of the operations that made it), rounded or not.
        grid: Where to put it.
        learned: How the grid's scale is learned; None if it is not.
    """
    scale = grid.scale if learned else None
    return _straight_through(learned, x, jax.lax.stop_gradient(steps), grid, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(learned, x, steps, grid, scale):
    return _straight_through_forward(learned, x, steps, grid, scale)[0]


def _straight_through_forward(learned, x, steps, grid, scale):
    del scale  # It is the grid's.
    codes, kept = _numerics(grid).vjp_fwd(steps, estimate.CONTEXT)
    values = x if learned else None
    return (dequantize(codes, grid, x.dtype), codes), (kept, grid, values, codes)


def _straight_through_backward(learned, residuals, gradients):
    kept, grid, x, codes = residuals
    gradient, _ = _numerics(grid).vjp_bwd(kept, gradients[0])
    if not learned:
        return gradient, None, None, None
    moved = codes.astype(jnp.float32) - grid.zero
    if learned == "lsq":
        share = jax.lax.rsqrt(x.size / max(x.shape[0], 1) * grid.top) if x.ndim else 1.0
        slope = jnp.where(kept, moved - x.astype(jnp.float32) * grid.inverse, moved) * share
    else:
        slope = jnp.where(kept, 0.0, moved)
    of_scale = jnp.sum(gradients[0].astype(jnp.float32) * slope)
    return gradient, None, None, of_scale


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)


@jax.custom_vjp
def in_place_of(x: Float[Array, "..."], exact: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tensor `exact`, with the gradient of x: both stand for the same value."""
    return exact.astype(x.dtype)


in_place_of.defvjp(
    lambda x, exact: (in_place_of(x, exact), exact[..., :0]),
    lambda like, gradient: (gradient, jnp.zeros(gradient.shape, like.dtype)),
)


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
