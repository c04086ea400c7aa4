"""Quantize a tensor, with a straight-through gradient.

The forward pass computes codes. The backward pass is straight-through (Bengio et al. 2013,
arXiv:1308.3432): rounding has the derivative 1, and a clipped value gets the gradient 0. AQT
quantizes (its scaling, and its numerics as an extension point).
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from aqt.jax.v2 import utils as aqt_utils
from aqt.jax.v2.numerics import numerics as aqt_numerics
from jaxtyping import Array, Float, Int8

from jaxqat.quant._numerics import cpu, injection
from jaxqat.quant._numerics.first_order import first_order
from jaxqat.quant._numerics.grids import Grid, GridCalibration
from jaxqat.quant._numerics.promotion import default_promotion

# AQT builds its dataclasses with a decorator of its own, which type checkers do not see through.
_aqt_dataclass: Any = aqt_utils.flax_slots_kw_only_dataclass


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
        """Codes from the zero point of a symmetric grid to its last code."""
        return self.high

    def vjp_fwd(self, x, context):
        """Return codes, and which values were not clipped, for the backward pass."""
        del context
        # Added as floats: u may lie beyond int32, and below 2**24 the sum is exact.
        codes = jnp.round(x) + self.zero
        kept = (codes >= self.low) & (codes <= self.high)
        return jnp.clip(codes, self.low, self.high).astype(jnp.int8), kept

    def vjp_bwd(self, res, grad):
        """Return the gradient where the value was not clipped, and 0 where it was."""
        return (jnp.where(res, grad, jnp.zeros_like(grad)), None)


def _numerics(grid: Grid) -> AffineInt:
    return AffineInt(zero=grid.zero, low=grid.low, high=grid.high)


def in_units(x: Float[Array, "..."], grid: Grid) -> Float[Array, "..."]:
    """Return x in units of the grid's scale, u = x / scale, not rounded (by AQT's QTensor).

    A NaN becomes 0, the zero point: the integer network has no code for it.
    """
    x = x.astype(jnp.float32)
    calibration = functools.partial(GridCalibration, scale=grid.scale)
    quantizer = injection.make_quantizer(_numerics(grid), calibration, "per_tensor")
    quantizer.init_calibration()
    tensor: Any = quantizer.calibrate(x, calibration_axes=None).quant(x)
    return jnp.where(jnp.isnan(tensor.qvalue), jnp.zeros_like(tensor.qvalue), tensor.qvalue)


def dequantize(codes: Int8[Array, "..."], grid: Grid, dtype: Any) -> Float[Array, "..."]:
    """Return real values of codes, scale * (code - zero_point), computed in float32."""
    units = codes.astype(jnp.float32) - grid.zero
    return (units * grid.scale).astype(dtype)


def quantize(
    x: Float[Array, "..."],
    units: Float[Array, "..."],
    grid: Grid,
    *,
    learned: Literal["lsq", "pact"] | None = None,
    real: bool = False,
) -> tuple[Float[Array, "..."], Int8[Array, "..."]]:
    """Quantize a tensor: return its dequantized value, which has the gradient, and its codes.

    code = clip(round(u) + z, low, high). The gradient with respect to x is that of the
    dequantized value where low <= round(u) + z <= high, and 0 elsewhere. A learned scale s has a
    gradient too. For a clipped value it is code - z. For any other value it is code - z - u with
    'lsq' (Esser et al. 2020, arXiv:1902.08153, equation 3), and 0 with 'pact' (Choi et al. 2018,
    arXiv:1805.06085, equation 3, for the bound s Q_P in place of s). 'lsq' multiplies all of it by
    1 / sqrt(N Q_P), with N values per example and Q_P codes on the longer side of zero (section
    2.2). Both papers compare the value itself with the bounds; here the rounded value counts.

    Args:
        x: The real tensor. Only its gradient path and type are used, and its values if the scale
            is learned.
        units: u, the same tensor in units of the grid's scale (from `in_units`, or the integer
            form of the operations that made it), rounded or not.
        grid: The grid to quantize to.
        learned: Method that learns the grid's scale; None if it is not learned.
        real: Whether units come from x itself, which can be NaN: it has the code z, and the
            gradient 0, as a clipped value has. Units from an integer form cannot be NaN.
    """
    scale = grid.scale if learned else None
    return _straight_through(learned, real, x, jax.lax.stop_gradient(units), grid, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _straight_through(learned, real, x, units, grid, scale):
    return _straight_through_forward(learned, real, x, units, grid, scale)[0]


@default_promotion
def _straight_through_forward(learned, real, x, units, grid, scale):
    del scale  # It is the grid's.
    codes, kept = _numerics(grid).vjp_fwd(units, injection.CONTEXT)
    codes, kept = cpu.store((codes, kept))
    if real:
        kept &= ~jnp.isnan(x.astype(jnp.float32) * grid.inverse)
    x = first_order(x)
    values = x if learned else jnp.atleast_1d(x)[..., :0]
    return (dequantize(codes, grid, x.dtype), codes), (kept, grid, values, codes)


@default_promotion
def _straight_through_backward(learned, real, residuals, gradients):
    del real
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
    """Return `exact` with the gradient of x: both are the same value, computed in two ways."""
    return exact.astype(x.dtype)


in_place_of.defvjp(
    lambda x, exact: (in_place_of(x, exact), exact[..., :0]),
    lambda like, gradient: (gradient, jnp.zeros(gradient.shape, like.dtype)),
)
