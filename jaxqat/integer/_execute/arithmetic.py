"""Requantization: an int32 accumulator becomes whole steps of another grid, in one of two ways.

`float`: round(float32(a) * m), one conversion, one multiplication, round half to even. No compiler
has a multiply-add to contract in it, so its bits are the same on every platform.

`fixed_point`: floor((a * M + 2**(shift - 1)) / 2**shift) with an int32 mantissa M and a shift, m =
M / 2**shift exactly (Jacob et al. 2018, arXiv:1712.05877, section 2.2, with the two roundings of
its reference implementation joined to one): integers only. The 64-bit product is made of 32-bit
words, since JAX has no int64 without a global switch.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

MANTISSA_BITS = 31


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPoint:
    """Multipliers as integers: M / 2**shift, 2**30 <= M < 2**31.

    Attributes:
        mantissa: int32.
        shift: int32, of the mantissa's shape.
    """

    mantissa: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, multiplier: np.ndarray | np.float32) -> "FixedPoint":
        """The integers of positive float32 multipliers; exact, since 24 bits fit 31.

        Raises:
            ValueError: A multiplier of 2**30 or more, which no requantization has.
        """
        fraction, exponent = np.frexp(np.asarray(multiplier, np.float64))
        shift = MANTISSA_BITS - exponent.astype(np.int64)
        if (shift < 1).any():
            raise ValueError(f"multiplier must be below 2**30, got {np.max(multiplier)}.")
        mantissa = (fraction * 2.0**MANTISSA_BITS).astype(np.int64)
        return cls(mantissa.astype(np.int32), shift.astype(np.int32))


def rescale(values: Int[Array, "..."], multiplier: Array) -> Array:
    """round(float32(values) * multiplier), as float32."""
    return jnp.round(values.astype(jnp.float32) * multiplier)


def rescale_fixed(
    values: Int[Array, "..."], mantissa: Int[Array, "..."], shift: Int[Array, "..."]
) -> Int[Array, "..."]:
    """floor((values * mantissa + 2**(shift - 1)) / 2**shift), as int32.

    Args:
        values: int32 accumulators.
        mantissa: Positive int32, broadcastable to values.
        shift: 1 or more; from 63 on the result is 0.
    """
    high, low = _product64(values.astype(jnp.int32), mantissa)
    shift = jnp.asarray(shift, jnp.int32)
    short = shift < 32  # Each branch computes with shifts in its own range only.
    below, above = jnp.where(short, shift, 1), jnp.clip(jnp.where(short, 32, shift) - 32, 0, 31)
    rounded = low + _left(1, below - 1)
    carry = (rounded < low).astype(jnp.uint32)
    joined = _left(high + carry, 32 - below) | _right(rounded, below)
    # 2**(shift - 1) lies in the high word, but for shift 32, where it is the low one's top bit.
    top = jnp.where(shift > 32, _left(1, jnp.maximum(above - 1, 0)), low >> jnp.uint32(31))
    tall = _signed(high + top) >> above
    result = jnp.where(short, _signed(joined), tall)
    return jnp.where(shift > 62, 0, result)


def shift_to_even(values: Int[Array, "..."], shift: int) -> Int[Array, "..."]:
    """Return values / 2**shift rounded half to even, in integers."""
    if shift == 0:
        return values
    whole, rest, half = values >> shift, values & (2**shift - 1), 2 ** (shift - 1)
    return whole + ((rest > half) | ((rest == half) & (whole & 1 == 1))).astype(values.dtype)


def _product64(a: Array, mantissa: Array) -> tuple[Array, Array]:
    """High and low word of the signed 64-bit product of an int32 and a positive int32."""
    x, y = _unsigned(a), _unsigned(jnp.asarray(mantissa, jnp.int32))
    half, mask = jnp.uint32(16), jnp.uint32(0xFFFF)
    x_low, x_high, y_low, y_high = x & mask, x >> half, y & mask, y >> half
    first, second, third = x_low * y_low, x_high * y_low, x_low * y_high
    middle = (first >> half) + (second & mask) + (third & mask)
    low = (first & mask) | (middle << half)
    high = x_high * y_high + (second >> half) + (third >> half) + (middle >> half)
    # As an unsigned word a negative number is 2**32 too large.
    return high - jnp.where(a < 0, y, jnp.uint32(0)), low


def _unsigned(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _signed(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _left(x: Array | int, by: Array) -> Array:
    return jnp.asarray(x, jnp.uint32) << by.astype(jnp.uint32)


def _right(x: Array, by: Array) -> Array:
    return x >> by.astype(jnp.uint32)
