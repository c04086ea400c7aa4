"""The integer grid that a range stands for.

A grid turns a range into a scale and an integer zero point,

    real = scale * (code - zero_point),

with zero always a code (Jacob et al. 2018, arXiv:1712.05877, equation 1). `GridCalibration` hands
a grid's scale to AQT.
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

    Invariants: scale is positive; low <= zero_point <= high, so a real zero has a code of its
    own; codes fit int8; a symmetric grid holds None for its zero point 0, so that products leave
    out every zero-point term.

    Attributes:
        scale: Step size, real units per code; a float32 scalar.
        inverse: 1 / scale, kept because a division by a constant and a product with its
            reciprocal differ in the last bit, and which one XLA emits depends on the platform.
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
        """The zero point as float32, to shift rounded steps with."""
        return jnp.asarray(0 if self.zero_point is None else self.zero_point, jnp.float32)

    @property
    def top(self) -> Float[Array, ""]:
        """Codes on the longer side of zero, as float32: Q_P, of tensors that are not negative."""
        return jnp.maximum(self.high - self.zero, self.zero - self.low)

    @property
    def branch_steps(self) -> int:
        """Steps of this grid in one of `branch`: 1, or 2 if its codes span more than 8 bits signed.

        A term of a sum has both signs, the sum behind a ReLU one: 255 steps up from zero need a
        branch of -256 to 254. The ratio is a power of two, so that adding the branch is exact.
        """
        return 2 if self.high - self.low > 254 else 1

    @property
    def branch(self) -> "Grid":
        """The int8 grid of a term of a sum that is put on this grid: zero point 0."""
        scale, inverse = self.scale * self.branch_steps, self.inverse * (1 / self.branch_steps)
        return Grid(scale, inverse, None, -128, 127)


def grid(low: Float[Array, ""], high: Float[Array, ""], *, bits: int, symmetric: bool) -> Grid:
    """The grid of 2**bits codes that covers a range.

    Affine: scale = (high - low) / (2**bits - 1), zero_point = -2**(bits-1) - round(low / scale)
    (Krishnamoorthi 2018, arXiv:1806.08342, section 2.1), the range first widened to hold zero.
    Symmetric: scale = max(|low|, |high|) / (2**(bits-1) - 1), zero_point = 0 (section 2.2).

    Args:
        low: Smallest real value to cover.
        high: Largest real value to cover.
        bits: Width of the codes, 2 to 8.
        symmetric: Whether to keep the zero point at 0.

    Returns:
        The grid. An empty range gets the scale 1, so that zeros quantize to zeros, not to NaN.
    """
    top = 2 ** (bits - 1) - 1
    if symmetric:
        span, steps, bottom = jnp.maximum(jnp.abs(low), jnp.abs(high)), top, -top
    else:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        span, steps, bottom = high - low, 2**bits - 1, -top - 1
    scale = span * np.float32(1 / steps)
    # A span below the smallest normal float would have an infinite reciprocal. A NaN stays, so
    # that a network that diverged says so.
    scale = jnp.where(scale <= np.finfo(np.float32).tiny, jnp.float32(1), scale)
    inverse = 1.0 / scale
    if symmetric:
        zero_point = None
    else:
        # The sum is of integers: a multiply-add that XLA contracted would round differently.
        zero_point = bottom - jnp.round(low * inverse).astype(jnp.int32)
        zero_point = jnp.clip(zero_point, bottom, top)
    return Grid(scale, inverse, zero_point, bottom, top)


def with_scale(grid: Grid, scale: Float[Array, ""]) -> Grid:
    """The grid with a learned scale in the place of its own; codes and zero point stay."""
    scale = positive(scale)
    return dataclasses.replace(grid, scale=scale, inverse=1.0 / scale)


def positive(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """A learned scale as it counts: by its magnitude, and never 0."""
    return jnp.maximum(jnp.abs(scale), 1e-8)


def dynamic_grid(x: Float[Array, "..."], axes: tuple[int, ...], bits: int) -> Grid:
    """Symmetric grids of a tensor's own magnitudes: scale = max|x| / (2**(bits-1) - 1).

    Args:
        x: The tensor.
        axes: Axes that share one scale; the others have one each.
        bits: Width of the codes.
    """
    top = 2 ** (bits - 1) - 1
    magnitudes = jnp.abs(jax.lax.stop_gradient(x).astype(jnp.float32))
    scale = jnp.max(magnitudes, axis=axes, keepdims=True) * np.float32(1 / top)
    scale = jnp.where(scale <= np.finfo(np.float32).tiny, jnp.float32(1), scale)
    return Grid(scale, 1.0 / scale, None, -top, top)


@_aqt_dataclass
class GridCalibration(aqt_calibration.Calibration):
    """AQT calibration that answers with the scale of a static grid, whatever the tensor holds."""

    scale: jax.Array

    def get_scale_and_bias_and_sparsity(self, x, shared_axes, numerics_, context=None):
        """See `aqt.jax.v2.calibration.Calibration`; there is neither bias nor sparsity."""
        del shared_axes, numerics_, context
        scale = self.scale if self.scale.ndim else self.scale.reshape((1,) * x.ndim)
        return [scale], [], None
