"""Integer grids of activation ranges.

A grid gives a range a scale and an integer zero point,

    real = scale * (code - zero_point),

so that a real zero is a code (Jacob et al. 2018, arXiv:1712.05877, equation 1). `GridCalibration`
passes a grid's scale to AQT.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aqt.jax.v2 import calibration as aqt_calibration
from aqt.jax.v2 import utils as aqt_utils
from jaxtyping import Array, Float, Int

# AQT's decorator for its dataclasses, which type checkers do not see through.
_aqt_dataclass: Any = aqt_utils.flax_slots_kw_only_dataclass


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "inverse", "zero_point"],
    meta_fields=["low", "high"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The integer grid of one tensor: real = scale * (code - zero_point).

    Invariants: scale is positive; low <= zero_point <= high, so a real zero has a code; codes fit
    int8; a symmetric grid has None for its zero point 0, so that products omit every zero-point
    term.

    Attributes:
        scale: Step size, real units per code; a float32 scalar.
        inverse: 1 / scale. A division by a constant and a product with its reciprocal differ in
            the last bit, and the platform decides which one XLA emits, so grids store it.
        zero_point: Code of the real zero, an int32 scalar; None stands for a constant 0.
        low: Smallest code.
        high: Largest code.
    """

    scale: Float[Array, ""]
    inverse: Float[Array, ""]
    zero_point: Int[Array, ""] | None
    low: int
    high: int

    @property
    def zero(self) -> Float[Array, ""]:
        """The zero point as float32, to add to rounded units."""
        return jnp.asarray(0 if self.zero_point is None else self.zero_point, jnp.float32)

    @property
    def top(self) -> Float[Array, ""]:
        """Codes on the longer side of zero, as float32: Q_P for tensors that are not negative."""
        return jnp.maximum(self.high - self.zero, self.zero - self.low)


def grid(low: Float[Array, ""], high: Float[Array, ""], *, bits: int, symmetric: bool) -> Grid:
    """Return the grid of 2**bits codes that covers a range.

    Affine: scale = (high - low) / (2**bits - 1), zero_point = -2**(bits-1) - round(low / scale)
    (Krishnamoorthi 2018, arXiv:1806.08342, section 2.1), the range first widened to hold zero.
    Symmetric: scale = max(|low|, |high|) / (2**(bits-1) - 1), zero_point = 0 (section 2.2).

    Args:
        low: Smallest real value to cover.
        high: Largest real value to cover.
        bits: Width of the codes, 2 to 8.
        symmetric: Whether to keep the zero point at 0.

    Returns:
        The grid. An empty range gets the scale 1, so zeros quantize to zeros and not to NaN.
    """
    top = 2 ** (bits - 1) - 1
    if symmetric:
        span, units, bottom = jnp.maximum(jnp.abs(low), jnp.abs(high)), top, -top
    else:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        span, units, bottom = high - low, 2**bits - 1, -top - 1
    scale = span * np.float32(1 / units)
    # A span below the smallest normal float would have an infinite reciprocal. A NaN stays NaN, to
    # show that a network diverged.
    scale = jnp.where(scale <= np.finfo(np.float32).tiny, jnp.float32(1), scale)
    inverse = 1.0 / scale
    if symmetric:
        zero_point = None
    else:
        # An integer sum: XLA could contract a float one to a multiply-add, with other rounding.
        zero_point = bottom - jnp.round(low * inverse).astype(jnp.int32)
        zero_point = jnp.clip(zero_point, bottom, top)
    return Grid(scale, inverse, zero_point, bottom, top)


def with_scale(grid: Grid, scale: Float[Array, ""]) -> Grid:
    """Return the grid with a learned scale; codes and zero point stay."""
    scale = positive(scale)
    return dataclasses.replace(grid, scale=scale, inverse=1.0 / scale)


def stretched(grid: Grid, factor: float) -> Grid:
    """Return the grid for values that are multiplied by a factor: the same codes stand for them."""
    scale = grid.scale * factor
    return dataclasses.replace(grid, scale=scale, inverse=1.0 / scale)


def positive(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the magnitude of a learned scale, at least 1e-8: training may change its sign."""
    return jnp.maximum(jnp.abs(scale), 1e-8)


def dynamic_grid(x: Float[Array, "..."], axes: tuple[int, ...], bits: int) -> Grid:
    """Return symmetric grids of a tensor's own range: scale = max|x| / (2**(bits-1) - 1).

    Args:
        x: The tensor.
        axes: Axes that share one scale.
        bits: Width of the codes.
    """
    top = 2 ** (bits - 1) - 1
    magnitudes = jnp.abs(jax.lax.stop_gradient(x).astype(jnp.float32))
    scale = jnp.max(magnitudes, axis=axes, keepdims=True) * np.float32(1 / top)
    scale = jnp.where(scale <= np.finfo(np.float32).tiny, jnp.float32(1), scale)
    return Grid(scale, 1.0 / scale, None, -top, top)


@_aqt_dataclass
class GridCalibration(aqt_calibration.Calibration):
    """AQT calibration that returns the scale of a static grid for any tensor."""

    scale: jax.Array

    def get_scale_and_bias_and_sparsity(self, x, shared_axes, numerics_, context=None):
        """See `aqt.jax.v2.calibration.Calibration`; bias and sparsity are empty."""
        del shared_axes, numerics_, context
        scale = self.scale if self.scale.ndim else self.scale.reshape((1,) * x.ndim)
        return [scale], [], None
