"""Requantization against Python's big integers and exact fractions."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxqat.integer._execute.arithmetic import FixedPoint, rescale, rescale_fixed

LOWEST, HIGHEST = -(2**31), 2**31 - 1
EXTREMES = [LOWEST, LOWEST + 1, -(2**24) - 1, -1, 0, 1, 2**16, 2**24 + 1, HIGHEST - 1, HIGHEST]
fixed = jax.jit(rescale_fixed)


def exactly(value: int, mantissa: int, shift: int) -> int:
    """Return floor((value * mantissa + 2**(shift - 1)) / 2**shift) in Python integers."""
    return (value * mantissa + (1 << (shift - 1))) >> shift


def fits(value, mantissa, shift):
    return LOWEST <= exactly(value, mantissa, shift) <= HIGHEST


@pytest.mark.parametrize("shift", range(1, 71))
def test_fixed_point_equals_python_integers_at_every_shift(shift):
    """Extremes of int32, random values and ties, times the smallest, largest and odd mantissas."""
    rng = np.random.default_rng(shift)
    pairs = [(v, m) for v in EXTREMES for m in (2**30, 2**30 + 1, 1431655765, 2**31 - 1)]
    values, mantissas = rng.integers(LOWEST, 2**31, 200), rng.integers(2**30, 2**31, 200)
    # Magnitudes of all sizes, so that the result fits int32 at small shifts too.
    values >>= rng.integers(0, 32, 200)
    pairs += zip(values.tolist(), mantissas.tolist(), strict=True)
    if 31 <= shift <= 61:
        # value * 2**30 = odd * 2**(shift - 1): a tie, which rounds up for either sign.
        ties = [n << (shift - 31) for n in (-3, -1, 1, 3)]
        pairs += [(v, 2**30) for v in ties if LOWEST <= v <= HIGHEST]
    pairs = [(v, m) for v, m in pairs if fits(v, m, shift)]
    given_values, given_mantissas = np.array(pairs, np.int32).T
    result = fixed(given_values, given_mantissas, np.full(len(pairs), shift, np.int32))
    assert result.dtype == jnp.int32
    assert np.asarray(result).tolist() == [exactly(v, m, shift) for v, m in pairs]


def test_ties_round_up_for_either_sign():
    one_half = FixedPoint.of(np.float32(0.5))
    values = np.array([-5, -3, -1, 1, 3, 5], np.int32)
    result = fixed(values, jnp.asarray(one_half.mantissa), jnp.asarray(one_half.shift))
    assert np.asarray(result).tolist() == [-2, -1, 0, 1, 2, 3]


@settings(derandomize=True, deadline=None, max_examples=150)
@example(LOWEST, 1.0)
@example(HIGHEST, 1.0)
@example(HIGHEST, 2.0**-31)
@example(LOWEST, 2.0**-32)
@example(LOWEST, 2.0**-126)
@given(
    st.integers(LOWEST, HIGHEST),
    st.floats(2.0**-40, 1.0, width=32) | st.floats(2.0**-126, 2.0**-20, width=32),
)
def test_fixed_point_is_the_product_rounded_half_up(value, multiplier):
    """The reference is the exact product of integer and float32 multiplier, as a fraction."""
    converted = FixedPoint.of(np.array([multiplier], np.float32))
    mantissa, shift = int(converted.mantissa[0]), int(converted.shift[0])
    assert Fraction(mantissa, 2**shift) == Fraction(multiplier)
    assert 2**30 <= mantissa < 2**31
    expected = math.floor(Fraction(multiplier) * value + Fraction(1, 2))
    result = fixed(np.array([value], np.int32), converted.mantissa, converted.shift)
    assert int(result[0]) == expected


def test_each_channel_has_its_own_mantissa_and_shift():
    multiplier = np.array([0.3, 1e-6, 0.99999994, 2.5], np.float32)
    converted = FixedPoint.of(multiplier)
    assert converted.mantissa.dtype == converted.shift.dtype == np.int32
    values = np.random.default_rng(0).integers(-(2**20), 2**20, (50, 4)).astype(np.int32)
    result = np.asarray(fixed(values, converted.mantissa, converted.shift))
    for row, computed in zip(values, result, strict=True):
        exact = [math.floor(Fraction(float(m)) * int(v) + Fraction(1, 2))
                 for v, m in zip(row, multiplier, strict=True)]  # fmt: skip
        assert computed.tolist() == exact


def test_fixed_point_and_float_differ_only_near_ties():
    """The float product has one more rounding, of half a float32 unit, for values below 2**24."""
    rng = np.random.default_rng(1)
    values = rng.integers(-(2**23), 2**23, 20000).astype(np.int32)
    multiplier = np.float32(1.2345e-5)
    converted = FixedPoint.of(multiplier)
    integer = np.asarray(fixed(values, converted.mantissa, converted.shift)).astype(int)
    floating = np.asarray(jax.jit(rescale)(values, multiplier)).astype(int)
    (differing,) = np.nonzero(integer != floating)
    for i in differing:
        exact = Fraction(float(multiplier)) * int(values[i])
        from_tie = abs(exact - math.floor(exact) - Fraction(1, 2))
        assert from_tie <= abs(exact) * Fraction(1, 2**24)
    assert len(differing) < len(values) / 1000
    assert np.ptp(integer) > 100  # The results vary, so the comparison is meaningful.


def test_float_requantization_is_one_product_and_a_rounding_half_to_even():
    rng = np.random.default_rng(2)
    values = np.concatenate([np.array(EXTREMES), rng.integers(LOWEST, 2**31, 5000)])
    values = values.astype(np.int32)
    for multiplier in np.array([1.0, 0.5, 3e-8, 0.7], np.float32):
        # NumPy's conversion to float32, product and `round` follow IEEE 754 too.
        expected = np.round(values.astype(np.float32) * multiplier)
        result = np.asarray(jax.jit(rescale)(values, multiplier))
        np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))
    ties = jnp.array([-5, -3, -1, 1, 3, 5])
    assert np.asarray(rescale(ties, jnp.float32(0.5))).tolist() == [-2, -2, -0.0, 0, 2, 2]


@pytest.mark.parametrize("multiplier", [2.0**30, 1e20])
def test_a_multiplier_of_2_to_the_30_or_more_raises_an_error(multiplier):
    with pytest.raises(ValueError, match=r"multiplier must be below 2\*\*30, got"):
        FixedPoint.of(np.array([0.5, multiplier], np.float32))
    assert int(FixedPoint.of(np.float32(2.0**29)).shift) == 1
