"""The differentiable integer operations: quantize a tensor, multiply codes.

Forward passes run on integers. Backward passes are straight-through (Bengio et al. 2013,
arXiv:1308.3432): rounding has the derivative 1, and a value that was clipped gets the gradient 0.
What is kept for them is int8: the codes of both operands, not their float values. AQT quantizes
(its scaling, its absmax calibration, its numerics as an extension point); the products are ours,
since AQT's convolution has no gradient and multiplies in floating point.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_quantizer
from aqt.jax.v2 import calibration as aqt_calibration
from aqt.jax.v2 import utils as aqt_utils
from aqt.jax.v2.numerics import int_numerics
from aqt.jax.v2.numerics import numerics as aqt_numerics
from jaxtyping import Array, Float, Int, Int8

from jaxqat.quant.products import Product, backward
from jaxqat.quant.ranges import Grid, GridCalibration

# AQT builds its dataclasses with a decorator of its own, which type checkers do not see through.
_aqt_dataclass: Any = aqt_utils.flax_slots_kw_only_dataclass
_Context: Any = aqt_utils.Context
_Quantizer: Any = aqt_quantizer.Quantizer
_IntSymmetric: Any = int_numerics.IntSymmetric

_CONTEXT = _Context(key=None, train_step=None)


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
        context=_CONTEXT,
    )
    quantizer.init_calibration()
    tensor: Any = quantizer.calibrate(x, calibration_axes=None).quant(x)
    return tensor.qvalue


def dequantize(codes: Int8[Array, "..."], grid: Grid, dtype: Any) -> Float[Array, "..."]:
    """Real values of codes: scale * (code - zero_point), computed in float32."""
    steps = codes.astype(jnp.float32) - grid.zero
    return (steps * grid.scale).astype(dtype)


def quantize(
    x: Float[Array, "..."], steps: Float[Array, "..."], grid: Grid
) -> tuple[Float[Array, "..."], Int8[Array, "..."]]:
    """A tensor on a grid: its dequantized value, which carries the gradient, and its codes.

    code = clip(round(u) + z, low, high); the gradient with respect to x is that of the
    dequantized value where low <= round(u) + z <= high, and 0 elsewhere.

    Args:
        x: The real tensor; only its gradient path and its type are used.
        steps: u, the same tensor in units of the grid's scale (`in_steps`, or the integer form
            of the operations that made it).
        grid: Where to put it.
    """
    return _straight_through(x, jax.lax.stop_gradient(steps), grid)


@jax.custom_vjp
def _straight_through(x, steps, grid):
    return _straight_through_forward(x, steps, grid)[0]


def _straight_through_forward(x, steps, grid):
    codes, kept = _numerics(grid).vjp_fwd(steps, _CONTEXT)
    return (dequantize(codes, grid, x.dtype), codes), (kept, grid)


def _straight_through_backward(residuals, gradients):
    kept, grid = residuals
    gradient, _ = _numerics(grid).vjp_bwd(kept, gradients[0])
    return gradient, None, None


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
    weights: Float[Array, "..."], *, bits: int, axes: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Codes and scales of weights: symmetric, scale = max|w| / (2**(bits-1) - 1).

    Args:
        weights: Any float tensor.
        bits: Width of the codes, 2 to 8.
        axes: Axes that share one scale.

    Returns:
        int8 codes, and float32 scales of the weights' rank with `axes` reduced to 1. All-zero
        weights get a positive scale and the codes 0.
    """
    quantizer = _Quantizer(
        numerics=_IntSymmetric(
            bits=bits,
            preserve_zero=True,
            preserve_max_val=True,  # Without it, AQT divides by 127.5 and wastes half a code.
            clip=True,
            clip_gradient=False,  # The largest weight sets the scale: nothing is clipped.
            round=True,
            noise_fn=None,
            dtype=jnp.int8,
        ),
        calib_shared_axes=axes,
        scale_stop_grad=True,
        calibration=aqt_calibration.AbsMaxCalibration,
        context=_CONTEXT,
    )
    quantizer.init_calibration()
    weights = jax.lax.stop_gradient(weights).astype(jnp.float32)
    tensor: Any = quantizer.quant(weights, calibration_axes=None)[0]
    return tensor.qvalue, tensor.scale[0]


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedProduct:
    """A product and how its weights are quantized.

    Attributes:
        product: Convolution or dot.
        bits: Width of the weight codes.
        axes: Axes of the weights that share one scale.
        dtype: Type of the result.
    """

    product: Product
    bits: int
    axes: tuple[int, ...]
    dtype: Any


class ProductResult(NamedTuple):
    """What an integer product gives: y = scale * (total + correction), see `multiply`.

    Attributes:
        real: The result y, which carries the gradients.
        total: sum(q k), the accumulator, int32.
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
) -> ProductResult:
    """An integer product with straight-through gradients.

    y = s_x s_w (sum(q k) - z sum(k)) with the codes q of the activations and k of the weights
    (Jacob et al. 2018, arXiv:1712.05877, equation 7). The gradients are those of the float
    product at the dequantized operands, which the backward pass makes anew from int8 codes.

    Args:
        how: The product and the quantization of its weights.
        x: Dequantized activations: the path of the gradient, not read in the forward pass.
        codes: Codes of the activations.
        grid: Their grid.
        weights: Float weights; quantized here.
    """
    result: Any = _multiply(how, x, codes, grid, weights)
    return ProductResult(*result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(how, x, codes, grid, weights):
    del x
    return _multiply_forward(how, None, codes, grid, weights)[0]


def _multiply_forward(how, x, codes, grid, weights):
    weight_codes, weight_scale = quantize_weights(weights, bits=how.bits, axes=how.axes)
    total = how.product.accumulate(codes, weight_codes)
    if grid.zero_point is None:
        correction = jnp.zeros((), jnp.int32)
    else:
        sums = how.product.zero_sums(codes.shape, weight_codes)
        correction = -grid.zero_point * sums
    channels = [1 if a in how.product.channel_axes else n for a, n in enumerate(weights.shape)]
    per_channel = how.product.over_output(jnp.broadcast_to(weight_scale, channels))
    sums = (total + correction).astype(jnp.float32)
    real = (sums * (grid.scale * per_channel)).astype(how.dtype)
    # Empty arrays carry the types of the two gradients to the backward pass.
    like = (None if x is None else x[..., :0], weights[..., :0])
    kept = (codes, grid, weight_codes, weight_scale, like)
    return (real, total, correction, per_channel, weight_codes), kept


def _multiply_backward(how, kept, gradients):
    codes, grid, weight_codes, weight_scale, (x_like, weights_like) = kept
    x = dequantize(codes, grid, x_like.dtype)
    weights = (weight_codes.astype(jnp.float32) * weight_scale).astype(x.dtype)
    gradient_x, gradient_weights = backward(how.product, x, weights, gradients[0])
    return gradient_x, None, None, gradient_weights.astype(weights_like.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)
