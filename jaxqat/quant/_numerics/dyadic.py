"""Dyadic multipliers: a sum of tensors on different grids, exact in float32.

Codes q_i with scales s_i are added on a grid with the scale s and the zero point z by

    code = clip(round(sum_i (q_i - z_i) m_i + z), low, high),    m_i = M_i / 2**shift,

where M_i / 2**shift is s_i / s, rounded to a common denominator (Jacob et al. 2018,
arXiv:1712.05877, section 2.2, multiply by integers and shift likewise). The denominator is so
small that every intermediate result is an integer below 2**24 over 2**shift. float32 holds these
exactly, in any order of operations and with or without fused multiply-adds, so all programs and
kernels round the same number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxqat.quant._numerics import cpu

# 255 (2**16 + 1) < 2**24: float32 holds sums of codes times factors below 2**16, and a rounding.
_BITS = 16
LARGEST_SHIFT = _BITS - 1


class Dyadic(NamedTuple):
    """Multipliers factor / 2**shift of the terms of a sum.

    Attributes:
        factors: Positive int32 scalars, one for each term.
        shift: int32 scalar, 0 to 15, common to all terms.
    """

    factors: tuple[Int[Array, ""], ...]
    shift: Int[Array, ""]

    @property
    def multipliers(self) -> tuple[Float[Array, ""], ...]:
        """The multipliers as float32, which is exact."""
        unit = _power_of_two(-self.shift)
        return cpu.store(tuple(factor.astype(jnp.float32) * unit for factor in self.factors))


def dyadic(ratios: Sequence[Float[Array, ""]]) -> Dyadic:
    """Round the ratios of scales s_i / s to integers over one power of two.

    shift is the largest integer from 0 to 15 with (1 + sum_i ratio_i) 2**shift < 2**16, and
    M_i = round(ratio_i 2**shift), at least 1. A ratio of 2**15 or more saturates every code but
    the zero point; it becomes 2**15.

    Args:
        ratios: One positive ratio for each term of the sum.
    """
    _, exponent = jnp.frexp(1.0 + sum(ratios[1:], start=ratios[0]))
    shift = jnp.clip(_BITS - exponent, 0, LARGEST_SHIFT).astype(jnp.int32)
    largest = jnp.where(shift == 0, 2.0 ** (_BITS - 1), 2.0**_BITS)
    factors = (jnp.round(ratio * _power_of_two(shift)) for ratio in ratios)
    return Dyadic(tuple(jnp.clip(f, 1.0, largest).astype(jnp.int32) for f in factors), shift)


def _power_of_two(exponent: Int[Array, ""]) -> Float[Array, ""]:
    """Return 2**exponent to the bit, for exponents of normal numbers; `exp2` may round."""
    return jax.lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)
