"""Straight-through gradients against their formulas, and what the backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from references import integers

from jaxqat.quant._numerics import activations, grids, multiply, weights
from jaxqat.quant._numerics.products import Convolution
from jaxqat.quant.recipe import Settings


def grid(low, high, *, bits=8, symmetric=False):
    return grids.grid(jnp.float32(low), jnp.float32(high), bits=bits, symmetric=symmetric)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 1, 2, 3)], ids=["per_channel", "per_tensor"])
def test_weight_codes_are_the_nearest_on_the_grid_of_the_largest_weight(axes, bits):
    w = np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32)
    codes, scale = weights.quantize_weights(jnp.asarray(w), Settings(weight_bits=bits), axes)
    top = 2 ** (bits - 1) - 1
    exact = np.abs(w.astype(np.float64)).max(axes, keepdims=True) / top
    # XLA may divide by a constant as a product with its reciprocal: two float32 roundings.
    np.testing.assert_allclose(scale, exact, rtol=2**-23)
    assert codes.dtype == jnp.int8
    # Half a step, and four float32 roundings on a quotient of at most `top`.
    assert np.abs(w / exact - np.asarray(codes)).max() <= 0.5 + top * 2**-22
    assert (np.abs(np.asarray(codes, int)).max(axes) == top).all()


def test_all_zero_weights_quantize_to_zeros_with_a_positive_scale():
    codes, scale = weights.quantize_weights(jnp.zeros((3, 4)), Settings(), (0,))
    assert not np.asarray(codes).any()
    assert (np.asarray(scale) > 0).all() and np.isfinite(scale).all()


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_the_gradient_of_quantize_is_one_inside_the_range_and_zero_where_clipped(symmetric):
    g = grid(-1.0, 3.0, symmetric=symmetric)
    x = np.linspace(-5, 5, 2001, dtype=np.float32)

    def weighted(x):
        values, _ = activations.quantize(x, activations.in_units(x, g), g)
        return jnp.sum(values * jnp.arange(x.size))

    # Clipped, by the definition: round(x / s) + z outside of the codes. In float64; no point of
    # this grid of x lies within a float32 rounding of a tie there (checked by the margin).
    scale, zero = (3 / 127, 0) if symmetric else integers.affine_grid(-1.0, 3.0)
    steps = x.astype(np.float64) / np.float64(scale)
    ends = np.array([-127 if symmetric else -128, 127]) - zero + np.array([-0.5, 0.5])
    assert np.abs(steps[:, None] - ends).min() > 1e-4
    kept = (steps > ends[0]) & (steps < ends[1])
    assert 0 < kept.sum() < x.size
    np.testing.assert_array_equal(jax.grad(weighted)(x), np.where(kept, np.arange(x.size), 0))


def product_of(x, w):
    def float_convolution(x, w):
        return lax.conv_general_dilated(
            x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    equation = jax.make_jaxpr(float_convolution)(x, w).jaxpr.eqns[0]
    return Convolution(equation.primitive, equation.params, 4), float_convolution


def setup(symmetric):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 6, 6, 4)).astype(np.float32)
    w = rng.normal(size=(3, 3, 4, 8)).astype(np.float32)
    product, float_convolution = product_of(x, w)
    quantizer = multiply.ProductQuantizer(Settings(), (0, 1, 2), jnp.float32, product)
    return x, w, grid(-1.5, 2.0, symmetric=symmetric), quantizer, float_convolution


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_a_product_and_its_gradients_are_the_analytic_straight_through_ones(symmetric):
    x, w, g, quantizer, _ = setup(symmetric)
    cotangent = np.random.default_rng(2).normal(size=(2, 3, 3, 8)).astype(np.float32)

    def quantized(x, w):
        values, codes = activations.quantize(x, activations.in_units(x, g), g)
        return multiply.multiply(quantizer, values, codes, g, w).real

    y, pullback = jax.vjp(quantized, jnp.asarray(x), jnp.asarray(w))
    gradient_x, gradient_w = pullback(jnp.asarray(cotangent))

    # The same by hand, in float64: fake-quantize both, convolve; then dw = x_q * g (all of it),
    # dx = g * w_q where x was not clipped, each written as a sum over taps.
    scale, zero = np.float64(g.scale), int(g.zero)
    low = -127 if symmetric else -128
    steps = np.round(x.astype(np.float64) / scale) + zero
    kept = (steps >= low) & (steps <= 127)
    fake_x = (np.clip(steps, low, 127) - zero) * scale
    codes, weight_scale = integers.weight_codes(w)
    fake_w = codes * weight_scale
    expected = integers.conv2d(fake_x, fake_w, stride=(2, 2), padding=((1, 1), (1, 1)))
    padded = np.pad(fake_x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    dx, dw = np.zeros_like(padded), np.zeros(w.shape)
    for i in range(3):
        for j in range(3):
            window = (slice(None), slice(i, i + 5, 2), slice(j, j + 5, 2))
            dw[i, j] = np.einsum("bhwi,bhwo->io", padded[window], cotangent)
            dx[window] += cotangent @ fake_w[i, j].T
    dx = dx[:, 1:-1, 1:-1] * kept

    # The integer sum is exact; its two scales and their product round three times.
    np.testing.assert_allclose(y, expected, rtol=4 * 2**-24, atol=1e-30)
    # Sums of at most 36 (x: 9 taps of 8 channels, w: 18 positions) float32 products, on operands
    # rounded twice: n rounding errors relative to the sum of magnitudes.
    size = np.abs(cotangent).max() * np.abs(fake_w).max() * 72
    np.testing.assert_allclose(gradient_x, dx, atol=72 * 2**-23 * size)
    size = np.abs(cotangent).max() * np.abs(fake_x).max() * 18
    np.testing.assert_allclose(gradient_w, dw, atol=18 * 2**-23 * size)


def test_a_convolution_keeps_int8_and_no_float_tensor_for_the_backward_pass():
    x, w, g, quantizer, _ = setup(False)

    def quantized(x, w):
        values, codes = activations.quantize(x, activations.in_units(x, g), g)
        return multiply.multiply(quantizer, values, codes, g, w).real

    _, pullback = jax.vjp(quantized, jnp.asarray(x), jnp.asarray(w))
    kept = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "dtype")]
    sizes = {
        str(leaf.dtype): max(np.size(k) for k in kept if k.dtype == leaf.dtype) for leaf in kept
    }
    assert sizes["int8"] == x.size  # The codes of x, and those of w.
    assert sizes["bool"] == x.size  # What was not clipped.
    assert sizes["float32"] <= 8  # Scales only.


def test_without_a_straight_through_estimator_a_kernel_would_get_no_gradient():
    """What AQT's own convolution does (its issue 285); the reason for `multiply`."""
    x, w, g, quantizer, _ = setup(True)
    codes = activations.quantize(jnp.asarray(x), activations.in_units(jnp.asarray(x), g), g)[1]

    def through_the_codes(w):
        weight_codes, scale = weights.quantize_weights(w, Settings(), (0, 1, 2))
        return jnp.sum(quantizer.product.accumulate(codes, weight_codes) * scale)

    def straight_through(w):
        return jnp.sum(multiply.multiply(quantizer, jnp.asarray(x), codes, g, w).real)

    assert not np.asarray(jax.grad(through_the_codes)(jnp.asarray(w))).any()
    assert np.asarray(jax.grad(straight_through)(jnp.asarray(w))).all()


def test_bfloat16_models_multiply_codes_of_their_float32_weights():
    x, w, g, _, _ = setup(True)
    product, _ = product_of(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    quantizer = multiply.ProductQuantizer(Settings(), (0, 1, 2), jnp.bfloat16, product)

    def quantized(x, w):
        values, codes = activations.quantize(x, activations.in_units(x, g), g)
        return multiply.multiply(quantizer, values, codes, g, w)

    x = jnp.asarray(x, jnp.bfloat16)
    result, pullback = jax.vjp(quantized, x, jnp.asarray(w))
    assert result.real.dtype == jnp.bfloat16
    codes = np.asarray(activations.quantize(x, activations.in_units(x, g), g)[1], np.int64)
    expected = integers.conv2d(
        codes, integers.weight_codes(w)[0], stride=(2, 2), padding=((1, 1), (1, 1))
    )
    np.testing.assert_array_equal(np.asarray(result.total, np.int64), expected)
    gradients = pullback(jax.tree.map(jnp.ones_like, result))
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
