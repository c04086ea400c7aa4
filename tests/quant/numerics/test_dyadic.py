"""Dyadic multipliers: as exact as float32 allows, in every order of operations."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqat.quant._numerics.dyadic import dyadic

RANDOM = np.exp(np.random.default_rng(0).uniform(np.log(1e-3), np.log(3e3), (200, 2)))
# Sums at and beside powers of two, one that vanishes, one whose codes all saturate.
EDGES = [(1, 1), (0.5, 0.5), (3, 4), (1, 2**-24), (1e-9, 1), (7, 8 - 2**-20), (1e9, 1), (1e9, 1e9)]
RATIOS = np.array([*RANDOM, *EDGES], np.float32)


@jax.jit
def rounded(ratios):
    found = dyadic([ratios[0], ratios[1]])
    return found.factors, found.shift, found.multipliers


def of_ratios(ratios):
    factors, shift, multipliers = rounded(ratios)
    return [int(f) for f in factors], int(shift), [float(m) for m in multipliers]


def test_multipliers_are_the_ratios_in_as_many_bits_as_a_sum_leaves():
    for ratios in RATIOS:
        factors, shift, multipliers = of_ratios(ratios)
        assert 255 * (sum(factors) + 2**shift) < 2**24
        assert multipliers == [factor / 2**shift for factor in factors]
        total = 1 + sum(map(Fraction, map(float, ratios)))
        if total < 2**15:
            # float32 rounds the total, so at a power of two the shift may be one smaller.
            assert total * 2 ** (shift - 1) < 2**16
            assert shift == 15 or total * (1 + Fraction(1, 2**22)) * 2 ** (shift + 1) >= 2**16
            assert factors == [max(round(float(r) * 2.0**shift), 1) for r in ratios]


def test_every_order_of_operations_gives_the_same_codes():
    rng = np.random.default_rng(1)
    for ratios in RATIOS:
        factors, shift, multipliers = of_ratios(ratios)
        a, b = rng.integers(-255, 256, (2, 500))
        zero = int(rng.integers(-128, 128))
        # NumPy's round and Python's of a Fraction are both half to even.
        exact = [
            round(Fraction(int(x) * factors[0] + int(y) * factors[1], 2**shift) + zero)
            for x, y in zip(a, b, strict=True)
        ]
        m, n = map(np.float32, multipliers)
        x, y, z = a.astype(np.float32), b.astype(np.float32), np.float32(zero)
        for order in ((x * m + y * n) + z, x * m + (y * n + z), (x * m + z) + y * n):
            np.testing.assert_array_equal(np.round(order), exact)


@pytest.mark.parametrize("count", [1, 3])
def test_the_sum_of_all_factors_counts(count):
    found = dyadic([jnp.float32(0.9)] * count)
    # 1 + 0.9 is below 2, 1 + 2.7 below 4.
    assert int(found.shift) == {1: 15, 3: 14}[count]
