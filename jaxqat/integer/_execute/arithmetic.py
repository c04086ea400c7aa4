"""Requantization: rescaling of int32 accumulators to rounded units of another grid, in two ways.

`float`: round(float32(a) * m), with one conversion, one multiplication and round half to even. It
has no addition that a compiler could fuse into a multiply-add, so all platforms agree bit for bit.

`fixed_point`: floor((a * M + 2**(shift - 1)) / 2**shift), in integers only, with an int32 mantissa
M and a shift such that m = M / 2**shift exactly (Jacob et al. 2018, arXiv:1712.05877, section 2.2,
but with one rounding instead of the two of its reference implementation). The 64-bit product is
computed in 32-bit words, because JAX has int64 only behind a global switch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxqat.errors import ExecutionError

MANTISSA_BITS = 31


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPoint:
    """Multipliers as integers: M / 2**shift with 2**30 <= M < 2**31.

    Attributes:
        mantissa: M, int32.
        shift: int32, of the same shape.
    """

    mantissa: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, multiplier: np.ndarray | np.float32) -> "FixedPoint":
        """Convert positive float32 multipliers exactly: their 24 bits fit a 31-bit mantissa.

        Raises:
            ExecutionError: If a multiplier is 2**30 or more, which no requantization needs.
        """
        fraction, exponent = np.frexp(np.asarray(multiplier, np.float64))
        shift = MANTISSA_BITS - exponent.astype(np.int64)
        if (shift < 1).any():
            raise ExecutionError(f"multiplier must be below 2**30, got {np.max(multiplier)}.")
        mantissa = (fraction * 2.0**MANTISSA_BITS).astype(np.int64)
        return cls(mantissa.astype(np.int32), shift.astype(np.int32))


def rescale(values: Int[Array, "..."], multiplier: Array) -> Array:
    """Return round(float32(values) * multiplier) as float32."""
    return jnp.round(values.astype(jnp.float32) * multiplier)


def rescale_fixed(
    values: Int[Array, "..."], mantissa: Int[Array, "..."], shift: Int[Array, "..."]
) -> Int[Array, "..."]:
    """Return floor((values * mantissa + 2**(shift - 1)) / 2**shift) as int32.

    Args:
        values: int32 accumulators.
        mantissa: Positive int32, broadcastable to `values`.
        shift: 1 or more; the result is 0 from 63 on.
    """
    high, low = _product64(values.astype(jnp.int32), mantissa)
    shift = jnp.asarray(shift, jnp.int32)
    short = shift < 32  # Both branches are evaluated, so clip the shifts of each to its range.
    by, high_by = jnp.where(short, shift, 1), jnp.clip(jnp.where(short, 32, shift) - 32, 0, 31)
    rounded = low + _left(1, by - 1)
    carry = (rounded < low).astype(jnp.uint32)
    short_result = _left(high + carry, 32 - by) | _right(rounded, by)
    # 2**(shift - 1) is in the high word; for shift 32 it is the top bit of the low word.
    half = jnp.where(shift > 32, _left(1, jnp.maximum(high_by - 1, 0)), low >> jnp.uint32(31))
    long_result = _signed(high + half) >> high_by
    result = jnp.where(short, _signed(short_result), long_result)
    return jnp.where(shift > 62, 0, result)


def shift_to_even(values: Int[Array, "..."], shift: int) -> Int[Array, "..."]:
    """Return values / 2**shift rounded half to even, in integers."""
    if shift == 0:
        return values
    whole, rest, half = values >> shift, values & (2**shift - 1), 2 ** (shift - 1)
    return whole + ((rest > half) | ((rest == half) & (whole & 1 == 1))).astype(values.dtype)


def _product64(a: Array, mantissa: Array) -> tuple[Array, Array]:
    """Return the high and low word of the 64-bit product of an int32 and a positive int32."""
    x, y = _unsigned(a), _unsigned(jnp.asarray(mantissa, jnp.int32))
    bits, mask = jnp.uint32(16), jnp.uint32(0xFFFF)
    x_low, x_high, y_low, y_high = x & mask, x >> bits, y & mask, y >> bits
    first, second, third = x_low * y_low, x_high * y_low, x_low * y_high
    middle = (first >> bits) + (second & mask) + (third & mask)
    low = (first & mask) | (middle << bits)
    high = x_high * y_high + (second >> bits) + (third >> bits) + (middle >> bits)
    # The unsigned word of a negative number is too large by 2**32.
    return high - jnp.where(a < 0, y, jnp.uint32(0)), low


def _unsigned(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _signed(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _left(x: Array | int, by: Array) -> Array:
    return jnp.asarray(x, jnp.uint32) << by.astype(jnp.uint32)


def _right(x: Array, by: Array) -> Array:
    return x >> by.astype(jnp.uint32)
