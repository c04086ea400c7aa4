"""Integer products against NumPy in int64, exactly."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from references import integers as reference

from jaxqat.pipeline.training import COMPILATIONS
from jaxqat.quant._numerics import cpu, windows
from jaxqat.quant._numerics.products import LARGEST, Convolution, Dot, backward

pytestmark = pytest.mark.slow


def convolution(x, w, **params):
    """The product that the trace of a convolution holds."""

    def float_convolution(x, w):
        return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **params)

    equation = jax.make_jaxpr(float_convolution)(x, w).jaxpr.eqns[0]
    return Convolution(equation.primitive, equation.params, 4)


@pytest.fixture(params=[*COMPILATIONS, "fast, matrix units"])
def compilation(request, monkeypatch):
    """A way to compile for a CPU, the fast one without and with a processor's matrix units."""
    name, _, units = request.param.partition(", ")
    monkeypatch.setattr(cpu, "has_matrix_units", lambda: bool(units))
    return COMPILATIONS[name]


CASES = {
    "same": dict(stride=(1, 1), padding=((1, 1), (1, 1))),
    "valid": dict(stride=(1, 1), padding=((0, 0), (0, 0))),
    "stride2": dict(stride=(2, 2), padding=((1, 1), (1, 1))),
    "uneven": dict(stride=(2, 1), padding=((0, 1), (2, 0))),
    "dilated": dict(stride=(1, 1), padding=((2, 2), (2, 2)), dilation=(2, 2)),
    "grouped": dict(stride=(1, 1), padding=((1, 1), (1, 1)), groups=3),
    "cropped": dict(stride=(1, 1), padding=((-1, 0), (0, -1))),
}


@pytest.mark.parametrize("channels", [(6, 12), (3, 21), (24, 18)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_convolution_of_codes_with_a_zero_point_is_that_of_the_shifted_codes(
    case, channels, compilation
):
    options = dict(CASES[case])
    groups, dilation = options.get("groups", 1), options.get("dilation", (1, 1))
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (2, 7, 8, channels[0])).astype(np.int8)
    weights = rng.integers(-127, 128, (3, 3, channels[0] // groups, channels[1])).astype(np.int8)
    product = convolution(
        jnp.zeros(codes.shape),
        jnp.zeros(weights.shape),
        window_strides=options["stride"],
        padding=options["padding"],
        rhs_dilation=dilation,
        feature_group_count=groups,
    )
    if case == "cropped":
        x = codes[:, 1:, :-1].astype(np.int64)
        options["padding"] = ((0, 0), (0, 0))
    else:
        x = codes.astype(np.int64)
    zero_point = -37
    expected = reference.conv2d(x - zero_point, weights.astype(np.int64), **options)
    total = compilation.compile(jax.jit(product.accumulate), codes, weights)(codes, weights)
    zero_sums = functools.partial(product.zero_sums, codes.shape)
    zeros = compilation.compile(jax.jit(zero_sums), weights)(weights)
    assert zeros.dtype == jnp.int32 and np.ndim(zeros) == 4
    actual = np.asarray(total, np.int64) - zero_point * np.asarray(zeros, np.int64)
    np.testing.assert_array_equal(actual, expected)


def test_a_transposed_convolution_accumulates_exactly(compilation):
    rng = np.random.default_rng(1)
    codes = rng.integers(-128, 128, (1, 4, 4, 4)).astype(np.int8)
    weights = rng.integers(-127, 128, (3, 3, 4, 20)).astype(np.int8)
    product = convolution(
        jnp.zeros(codes.shape),
        jnp.zeros(weights.shape),
        window_strides=(1, 1),
        padding=((1, 2), (1, 2)),
        lhs_dilation=(2, 2),
    )
    spread = np.zeros((1, 7, 7, 4), np.int64)
    spread[:, ::2, ::2] = codes.astype(np.int64) - 5
    expected = reference.conv2d(spread, weights.astype(np.int64), padding=((1, 2), (1, 2)))
    program = compilation.compile(jax.jit(product.accumulate), codes, weights)
    total = np.asarray(program(codes, weights), np.int64)
    zeros = np.asarray(product.zero_sums(codes.shape, weights), np.int64)
    np.testing.assert_array_equal(total - 5 * zeros, expected)


WIDE = {  # Data, weights and options of convolutions whose sums pass 2**24.
    "inputs": ((2, 5, 5, 180), (3, 3, 180, 4), {}),
    "groups": ((2, 4, 4, 320), (3, 3, 160, 6), dict(groups=2)),
    "four inputs": ((2, 18, 18, 4), (17, 17, 4, 4), {}),  # Cannot be split.
    "depthwise": ((2, 40, 40, 3), (34, 34, 1, 6), dict(groups=3)),
    "borders": ((2, 5, 6, 180), (3, 3, 180, 4), dict(padding=((1, 2), (0, -1)), stride=(2, 1))),
    "window": ((2, 20, 20, 4), (9, 9, 4, 4), dict(padding=((4, 4), (7, 8)), dilation=(2, 2))),
}


def wide(case):
    """Return product, codes, weights and exact sums of a case."""
    data_shape, weight_shape, given = WIDE[case]
    options = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), **given}
    rng = np.random.default_rng(0)
    codes = np.full(data_shape, -128, np.int8)
    codes[0].flat[::7] += 1  # Sums of all parities.
    weights = rng.choice(np.array([-127, 127], np.int8), weight_shape)
    weights[..., 0], weights[..., 1] = 127, -127
    product = convolution(
        jnp.zeros(data_shape),
        jnp.zeros(weight_shape),
        window_strides=options["stride"],
        padding=options["padding"],
        rhs_dilation=options["dilation"],
        feature_group_count=options.get("groups", 1),
    )
    cropped = codes.astype(np.int64)
    padding = []
    for axis, borders in enumerate(options["padding"], start=1):
        start, stop = (max(-border, 0) for border in borders)
        cropped = np.take(cropped, range(start, codes.shape[axis] - stop), axis)
        padding.append(tuple(max(border, 0) for border in borders))
    expected = reference.conv2d(
        cropped, weights.astype(np.int64), **{**options, "padding": tuple(padding)}
    )
    assert case == "window" or np.abs(expected).max() > 2**24
    return product, codes, weights, expected


@pytest.mark.parametrize("case", WIDE)
def test_the_convolution_on_cuda_is_exact_beyond_float32(case):
    product, codes, weights, expected = wide(case)
    total = jax.jit(functools.partial(product.on_cuda, largest=LARGEST))(codes, weights)
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("case", WIDE)
def test_the_convolution_on_a_cpu_is_exact_beyond_float32_however_it_is_compiled(case, compilation):
    product, codes, weights, expected = wide(case)
    program = compilation.compile(jax.jit(product.accumulate), codes, weights)
    np.testing.assert_array_equal(program(codes, weights), expected)


@pytest.mark.parametrize("case", ["inputs", "borders"])
def test_in_the_fast_form_a_convolution_of_codes_is_one_of_floats_or_a_dot(case, monkeypatch):
    product, codes, weights, _ = wide(case)

    def operands():
        text = jax.jit(lambda a, b: product.accumulate(a, b)).lower(codes, weights).as_text()
        pattern = r"stablehlo\.(convolution|dot_general).*: \(tensor<[^>]*x(\w+)>, tensor<"
        return set(re.findall(pattern, text))

    usual = {("convolution", "i8")}
    assert operands() == usual
    with cpu.form():
        monkeypatch.setattr(cpu, "has_matrix_units", lambda: False)
        assert operands() == {("convolution", "f32")}
        monkeypatch.setattr(cpu, "has_matrix_units", lambda: True)
        assert operands() == {("dot_general", "i8")}
    assert operands() == usual


@pytest.mark.parametrize("batch, parts", [(6, 3), (7, 7), (4, 1), (1, 1), (0, 1)])
def test_windows_are_gathered_of_as_many_examples_as_memory_holds(batch, parts, monkeypatch):
    rng = np.random.default_rng(2)
    codes = rng.integers(-128, 128, (batch, 6, 7, 5)).astype(np.int8)
    weights = rng.integers(-127, 128, (3, 2, 5, 4)).astype(np.int8)
    example = (2 * 3) * (3 * 2 * 5)  # Bytes: places of the output, and codes that each reads.
    monkeypatch.setattr(windows, "GATHERED", (4 if batch == 4 else 2) * example)

    def product(codes, weights):
        return windows.dot_over_windows_in_parts(codes, weights, (2, 2), (1, 1))

    equations = jax.make_jaxpr(product)(codes, weights).eqns
    loops = [each.params["length"] for each in equations if each.primitive.name == "scan"]
    assert loops == ([parts] if parts > 1 else [])
    expected = reference.conv2d(codes.astype(np.int64), weights.astype(np.int64), stride=(2, 2))
    np.testing.assert_array_equal(jax.jit(product)(codes, weights), expected)


def test_the_convolution_on_cuda_keeps_layout_and_input_dilation():
    rng = np.random.default_rng(1)
    codes = rng.integers(-128, 128, (6, 4, 5, 2)).astype(np.int8)  # Channels first, batch last.
    for groups, inputs in ((1, 6), (2, 3), (6, 1)):
        weights = rng.integers(-127, 128, (12, 3, 2, inputs)).astype(np.int8)

        def transposed(x, w, groups=groups):
            return lax.conv_general_dilated(
                x, w, (1, 2), ((1, 2), (0, 1)), lhs_dilation=(2, 1), feature_group_count=groups,
                dimension_numbers=("CHWN", "OHWI", "HNCW"), preferred_element_type=jnp.int32,
            )  # fmt: skip

        equation = jax.make_jaxpr(transposed)(codes, weights).jaxpr.eqns[0]
        product = Convolution(equation.primitive, equation.params, 4)
        # Small sums are exact in XLA's own convolution.
        expected = transposed(codes.astype(np.int32), weights.astype(np.int32))
        for largest in (LARGEST, 2**24 // 3):  # In one part, and in none.
            total = product.on_cuda(jnp.asarray(codes), jnp.asarray(weights), largest)
            np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize(
    "groups, inputs, largest, convolutions",
    [(1, 256, 128 * 128, 3), (1, 256, 8 * 8, 1), (2, 128, 128 * 128, 4), (256, 1, 128 * 128, 0)],
    ids=["split", "4 bits", "groups", "depthwise"],
)
def test_a_program_for_cuda_has_no_grouped_and_no_inexact_convolution(
    groups, inputs, largest, convolutions
):
    codes, weights = jnp.zeros((2, 8, 8, 256)), jnp.zeros((3, 3, inputs, 256))
    product = convolution(
        codes, weights, window_strides=(1, 1), padding="SAME", feature_group_count=groups
    )
    accumulate = jax.jit(functools.partial(product.accumulate, largest=largest))
    traced = accumulate.trace(codes.astype(jnp.int8), weights.astype(jnp.int8))
    lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    found = [line for line in lines if "stablehlo.convolution" in line]
    assert len(found) == convolutions
    assert all("feature_group_count = 1 " in line for line in found)
    most = 2**24 // (9 * largest)
    sizes = [int(n) for line in found for n in re.findall(r"tensor<3x3x(\d+)x\d+xi8>", line)]
    assert sum(sizes) == bool(convolutions) * 256 and all(size <= most for size in sizes)


DOTS = {  # Shapes of data and weights, the einsum of the product, and which side the weights are.
    "dense": ((5, 6), (6, 4), "bi,io->bo", 1),
    "sequence": ((2, 3, 6), (6, 4), "bti,io->bto", 1),
    "heads": ((2, 3, 6), (6, 2, 4), "bti,ihd->bthd", 1),
    "two contracted": ((2, 3, 4, 6), (4, 6, 5), "bthd,hdo->bto", 1),
    "weights left": ((6, 5), (4, 6), "ib,oi->ob", 0),
    "batched experts": ((3, 2, 6), (3, 6, 4), "ebi,eio->ebo", 1),
}


@pytest.mark.parametrize("case", DOTS)
def test_a_dot_of_codes_with_a_zero_point_is_that_of_the_shifted_codes(case):
    data_shape, weight_shape, formula, side = DOTS[case]
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, data_shape).astype(np.int8)
    weights = rng.integers(-127, 128, weight_shape).astype(np.int8)
    scale = rng.uniform(0.5, 2, weight_shape).astype(np.float32)

    def ordered(x, w):
        return (w, x) if side == 0 else (x, w)

    inputs, output = formula.split("->")
    flipped = ",".join(ordered(*inputs.split(","))) + "->" + output

    def float_dot(x, w):
        return jnp.einsum(flipped, *ordered(x, w))

    jaxpr = jax.make_jaxpr(float_dot)(jnp.zeros(data_shape), jnp.zeros(weight_shape)).jaxpr
    equations = [e for e in _all(jaxpr) if e.primitive.name == "dot_general"]
    assert len(equations) == 1
    rank = len(equations[0].outvars[0].aval.shape)
    product = Dot(equations[0].primitive, equations[0].params, rank, side)

    shifted = codes.astype(np.int64) + 7
    exact = np.einsum(formula, shifted, weights.astype(np.int64))
    total = np.asarray(product.accumulate(codes, weights), np.int64)
    zeros = np.asarray(product.zero_sums(codes.shape, weights), np.int64)
    actual = total + 7 * zeros
    if actual.shape != exact.shape:  # einsum may transpose after its dot.
        actual = actual.transpose(np.argsort([actual.shape.index(n) for n in exact.shape]))
    np.testing.assert_array_equal(actual, exact)
    # Per-channel scales land on the output's channels.
    per_channel = scale.max(axis=product.channel_axes, keepdims=True)
    spread = np.asarray(product.over_output(jnp.asarray(per_channel)))
    scaled = np.einsum(formula, np.ones(data_shape), per_channel * np.ones(weight_shape))
    count = np.einsum(formula, np.ones(data_shape), np.ones(weight_shape))
    np.testing.assert_allclose(spread * np.ones_like(total), scaled / count, rtol=1e-6)
    # Channels are where scales vary, behind the axes that both sides have.
    common = len(product.params["dimension_numbers"][1][0])
    varying = (axis for axis, n in enumerate(spread.shape) if n != 1)
    assert product.output_axes(weights.ndim) == tuple(a for a in varying if a >= common)


def _all(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _all(value.jaxpr)


def test_macs_count_every_multiplication_once():
    product = convolution(
        jnp.zeros((2, 8, 8, 6)),
        jnp.zeros((3, 3, 2, 12)),
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        feature_group_count=3,
    )
    assert product.macs((3, 3, 2, 12), (2, 4, 4, 12)) == 2 * 4 * 4 * 12 * 3 * 3 * 2


@pytest.mark.parametrize("options", [{}, dict(stride=(2, 2)), dict(dilation=(2, 1))], ids=str)
def test_gradients_of_a_depthwise_convolution_in_the_fast_form_are_those_of_the_usual_one(options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 9, 8, 6)).astype(np.float32)
    weights = rng.normal(size=(3, 3, 1, 12)).astype(np.float32)
    product = convolution(
        x,
        weights,
        window_strides=options.get("stride", (1, 1)),
        rhs_dilation=options.get("dilation", (1, 1)),
        padding=((1, 2), (0, 1)),
        feature_group_count=6,
        precision=lax.Precision.HIGHEST,
    )
    gradient = rng.normal(size=product.real(x, weights).shape).astype(np.float32)

    def gradients(x, weights, gradient):
        return backward(product, x, weights, gradient)

    usual, fast = (
        each.compile(jax.jit(gradients), x, weights, gradient)(x, weights, gradient)
        for each in COMPILATIONS.values()
    )
    # Each input meets 9 taps of 2 outputs: sums of 18 products, each rounded once, and the sum of
    # magnitudes is below 18 * 4 * 4. Kernel gradients are sums of at most 4 * 72 products.
    np.testing.assert_allclose(fast[0], usual[0], rtol=0, atol=18 * 18 * 16 * 2**-24)
    np.testing.assert_allclose(fast[1], usual[1], rtol=0, atol=288 * 288 * 16 * 2**-24)
    assert np.abs(np.asarray(usual[0])).max() > 1


def test_a_depthwise_convolution_is_a_sum_of_shifted_tensors_on_a_cpu():
    codes, weights = np.ones((1, 8, 8, 6), np.int8), np.ones((3, 3, 1, 6), np.int8)
    params = dict(window_strides=(1, 1), padding=((1, 1), (1, 1)), feature_group_count=6)
    product = convolution(jnp.zeros(codes.shape), jnp.zeros(weights.shape), **params)
    text = jax.jit(product.accumulate).lower(codes, weights).as_text()
    assert "stablehlo.convolution" not in text
    weights = np.ones((33, 3, 1, 6), np.int8)  # Too many taps to write out.
    product = convolution(jnp.zeros((1, 40, 8, 6)), jnp.zeros(weights.shape), **params)
    codes = np.ones((1, 40, 8, 6), np.int8)
    assert "stablehlo.convolution" in jax.jit(product.accumulate).lower(codes, weights).as_text()
