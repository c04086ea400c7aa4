import jax.numpy as jnp
import numpy as np
import pytest

from jaxqat.quant._numerics import grids, ranges
from jaxqat.quant._numerics.activations import in_units, quantize

RANGES = [(-1.0, 3.0), (0.0, 6.0), (-5.0, 0.0), (0.5, 2.0), (-3.0, -1.0), (-1e-3, 1e3)]


def grid(low, high, **options):
    return grids.grid(jnp.float32(low), jnp.float32(high), **options)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_real_zero_is_exactly_a_code(low, high, bits, symmetric):
    g = grid(low, high, bits=bits, symmetric=symmetric)
    zero = np.zeros((3,), np.float32)
    values, codes = quantize(jnp.asarray(zero), in_units(jnp.asarray(zero), g), g)
    np.testing.assert_array_equal(values, zero)
    np.testing.assert_array_equal(codes, np.full(3, int(g.zero)))
    assert g.low <= int(g.zero) <= g.high
    assert (g.low, g.high) == ((-(2 ** (bits - 1)) + symmetric, 2 ** (bits - 1) - 1))


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_every_value_of_the_range_is_within_one_step_and_inner_ones_within_half(
    low, high, bits, symmetric
):
    x = np.linspace(low, high, 1001, dtype=np.float32)
    g = grid(low, high, bits=bits, symmetric=symmetric)
    values, _ = quantize(jnp.asarray(x), in_units(jnp.asarray(x), g), g)
    top = 2 ** (bits - 1) - 1
    if symmetric:
        scale = max(abs(low), abs(high)) / top
    else:
        scale = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
    # Two float32 roundings (difference or absolute value; product with the reciprocal of steps,
    # itself rounded).
    np.testing.assert_allclose(g.scale, scale, rtol=3 * 2**-24)
    # Rounding the zero point shifts the grid by up to half a step against the range, so the ends
    # can be clipped by half a step more; then four float32 roundings on up to 2**bits steps.
    error = np.abs(np.asarray(values, np.float64) - x) / scale
    assert error.max() <= (0.5 if symmetric else 1.0) + 2**bits * 2**-22
    inner = (x > low + scale) & (x < high - scale)
    if inner.any():
        assert error[inner].max() <= 0.5 + 2**bits * 2**-22


def test_a_range_that_holds_only_zeros_quantizes_to_zeros():
    g = grid(0.0, 0.0, bits=8, symmetric=False)
    assert float(g.scale) == 1.0
    values, codes = quantize(jnp.zeros(2), in_units(jnp.zeros(2), g), g)
    assert not np.asarray(values).any() and (np.asarray(codes) == -128).all()


def test_a_range_is_the_mean_at_first_and_a_moving_average_later():
    decay, seen = 0.75, np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    state = ranges.empty_range()
    expected = np.zeros(2)
    for step, (low, high) in enumerate(seen):
        state = ranges.observe(state, jnp.float32(low), jnp.float32(high), decay)
        share = max(1 / (step + 1), 1 - decay)
        expected += share * (np.array([low, high], np.float64) - expected)
        if step < 4:
            np.testing.assert_allclose(expected, seen[: step + 1].mean(0), rtol=1e-6)
        # Three float32 roundings a step on values of order 1, kept by a factor of at most 0.75.
        np.testing.assert_allclose([state["min"], state["max"]], expected, atol=3 * 4 * 2**-22)
    assert int(state["count"]) == 20
