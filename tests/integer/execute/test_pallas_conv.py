"""The interpreted Pallas convolution returns exactly the codes of NumPy's int64 convolution.

tests/lowering/test_pallas_lowering.py checks the kernel as compiled for a GPU.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import integer_graph
from references.integers import conv2d

from jaxqat.integer._execute.pallas_conv import Residual, clip_round, convolve
from jaxqat.integer._execute.pallas_tiles import (
    Geometry,
    Tile,
    choose_tile,
    lay_out,
    padded_depth,
    unsupported_reason,
)

NONE, ONE, THREE = ((0, 0), (0, 0)), ((1, 1), (1, 1)), ((3, 3), (3, 3))
BOUNDS = (-120, 100)  # Smallest and largest code of the output.
# Of the other term zero point and factor, of the branch zero point, bounds and factor; over 2**14.
SUMMED = (-3, 11_633, 9, -120, 127, 24_001)
SHIFT = 14


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution on random codes; `plus` are the arguments of a residual addition."""

    shape: tuple[int, int, int, int]
    outputs: int
    geometry: Geometry
    zero_in: int
    plus: tuple[int, int, int, int, int, int] | None = None
    zero_out: int = 5
    seed: int = 0

    @property
    def operands(self):
        rng = np.random.default_rng(self.seed)
        window, (*_, inputs) = self.geometry.window, self.shape
        codes = rng.integers(-128, 128, self.shape).astype(np.int8)
        weights = rng.integers(-127, 128, (*window, inputs, self.outputs)).astype(np.int8)
        bias = rng.integers(-5000, 5000, self.outputs).astype(np.int32)
        # Uniform codes and weights have a standard deviation of 74 each, so outputs have about 60.
        spread = 60 / (74 * 74 * np.sqrt(weights[..., 0].size))
        multiplier = (rng.uniform(0.1, 1, self.outputs) * spread).astype(np.float32)
        output = (self.shape[0], *self.geometry.output, self.outputs)
        return codes, weights, bias, multiplier, rng.integers(-128, 128, output).astype(np.int8)

    def computed(self, tile=None, jit=False):
        codes, weights, bias, multiplier, other = self.operands
        matrix, biases = lay_out(weights, bias, geometry=self.geometry, zero_in=self.zero_in)

        def run(codes, other):
            return convolve(
                codes,
                jnp.asarray(matrix),
                jnp.asarray(biases),
                jnp.asarray(multiplier),
                geometry=self.geometry,
                zero_out=self.zero_out,
                low=BOUNDS[0],
                high=BOUNDS[1],
                residual=None if self.plus is None else _residual(other, *self.plus),
                tile=tile,
                interpret=True,
            )

        return np.asarray((jax.jit(run) if jit else run)(jnp.asarray(codes), jnp.asarray(other)))

    def expected(self):
        codes, weights, bias, multiplier, other = self.operands
        g = self.geometry
        crops = (
            slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(g.padding, g.size, strict=True)
        )
        cropped = codes[:, *crops]
        padding = tuple((max(a, 0), max(b, 0)) for a, b in g.padding)
        acc = conv2d(
            cropped.astype(np.int64) - self.zero_in,
            weights.astype(np.int64),
            stride=g.strides,
            padding=padding,
            dilation=g.dilation,
        )
        assert acc.shape[1:3] == g.output
        units = np.rint((acc + bias).astype(np.float32) * multiplier)  # NumPy rounds half to even.
        if self.plus is not None:
            zero, factor, branch_zero, low, high, branch_factor = self.plus
            branch = np.clip(units.astype(np.int64) + branch_zero, low, high) - branch_zero
            terms = (branch, other.astype(np.int64) - zero)
            return np.clip(
                integer_graph.summed(terms, (branch_factor, factor), SHIFT, self.zero_out), *BOUNDS
            ).astype(np.int8)
        return np.clip(units.astype(np.int64) + self.zero_out, *BOUNDS).astype(np.int8)


def _residual(codes, zero, factor, branch_zero, low, high, branch_factor):
    return Residual(
        codes=codes,
        zero_point=zero,
        multiplier=np.float32(factor / 2**SHIFT),
        branch_zero_point=branch_zero,
        branch_low=low,
        branch_high=high,
        branch_multiplier=np.float32(branch_factor / 2**SHIFT),
    )


def case(size, inputs, outputs, window, stride, padding, zero_in, plus=None, batch=1, **more):
    geometry = Geometry(
        size=(size, size) if isinstance(size, int) else size,
        window=(window, window),
        strides=(stride, stride),
        padding=padding,
        **more,
    )
    return Case((batch, *geometry.size, inputs), outputs, geometry, zero_in, plus)


# All layers of ResNet-18 at 32 x 32 (He et al. 2015): the stem, then the different ones per stage.
RESNET18 = {
    "stem": case(32, 3, 64, 3, 1, ONE, 17),
    "stage1/conv1": case(32, 64, 64, 3, 1, ONE, -128),
    "stage1/conv2": case(32, 64, 64, 3, 1, ONE, -128, SUMMED),
    "stage2/conv1": case(32, 64, 128, 3, 2, ONE, -128),
    "stage2/shortcut": case(32, 64, 128, 1, 2, NONE, -128),
    "stage2/conv2": case(16, 128, 128, 3, 1, ONE, -128, SUMMED),
    "stage3/conv1": case(16, 128, 256, 3, 2, ONE, -128),
    "stage3/shortcut": case(16, 128, 256, 1, 2, NONE, -128),
    "stage3/conv2": case(8, 256, 256, 3, 1, ONE, -128, SUMMED),
    "stage4/conv1": case(8, 256, 512, 3, 2, ONE, -128),
    "stage4/shortcut": case(8, 256, 512, 1, 2, NONE, -128),
    "stage4/conv2": case(4, 512, 512, 3, 1, ONE, -128, SUMMED, batch=2),
}
# Partial tiles in pixels, channels, depth or several of them, and all kinds of edges.
ODD = {
    "zero_point_0": case((7, 5), 12, 20, 3, 1, ONE, 0, SUMMED, batch=3),
    "zero_point_17": case((7, 5), 12, 20, 3, 2, ONE, 17, batch=3),
    "zero_point_127": case((6, 9), 4, 68, 3, 2, ONE, 127, SUMMED),
    "padding_of_one_side": case((9, 6), 8, 12, 3, 2, ((0, 1), (1, 0)), -128),
    "padding_of_a_side_twice": case((9, 6), 8, 12, 3, 1, ((0, 2), (3, 1)), 9),
    "padding_negative": case((9, 9), 4, 8, 3, 1, ((-1, 1), (0, -2)), -7),
    "dilation": case((9, 8), 16, 4, 3, 1, ((2, 2), (2, 2)), -7, dilation=(2, 1)),
    "no_window_inside": case(2, 16, 4, 3, 1, ONE, -128, batch=2),
    "no_window_inside_one_axis": case((1, 9), 8, 8, 4, 1, ((2, 2), (2, 1)), 3),
    "imagenet_stem": case((18, 16), 3, 8, 7, 2, THREE, -128),
    "one_channel": case((5, 5), 1, 4, 3, 1, ONE, -128),
    "one_output": case((5, 5), 64, 1, 1, 1, NONE, -128),
    "pointwise_narrow": case((3, 3), 8, 12, 1, 1, NONE, -100, SUMMED),
    "pointwise_depth_36": case((3, 3), 36, 12, 1, 3, NONE, -100),
    "channels_96": case((4, 4), 96, 48, 3, 1, ONE, -128, SUMMED),
}


def params(cases):
    return [pytest.param(value, id=name) for name, value in cases.items()]


@pytest.mark.parametrize("case", params(RESNET18))
def test_codes_of_all_resnet18_layers_equal_the_int64_reference(case):
    codes = case.computed()
    np.testing.assert_array_equal(codes, case.expected())
    assert len(np.unique(codes)) > 200  # Nearly the whole range, so saturation hides no difference.


@pytest.mark.parametrize("case", params(ODD))
def test_codes_of_odd_shapes_equal_the_int64_reference(case):
    codes = case.computed()
    np.testing.assert_array_equal(codes, case.expected())
    assert len(np.unique(codes)) > 10


def test_symmetric_codes_need_one_bias_for_inner_and_edge_pixels():
    shape = case(8, 16, 16, 3, 1, ONE, 0)
    _, weights, bias, *_ = shape.operands
    assert lay_out(weights, bias, geometry=shape.geometry, zero_in=0)[1].shape == (1, 16)
    # (Top, middle, bottom) x (left, middle, right).
    assert lay_out(weights, bias, geometry=shape.geometry, zero_in=1)[1].shape == (9, 16)


@pytest.mark.parametrize(
    "tile",
    [
        Tile(rows=16, outputs=16, block=32, warps=1, stages=2),
        Tile(rows=32, outputs=64, block=128, warps=4, stages=1),
        Tile(rows=256, outputs=32, block=64, warps=8, stages=5),
    ],
)
def test_every_tile_gives_the_same_codes(tile):
    shape = dataclasses.replace(ODD["channels_96"], outputs=72)
    shape = dataclasses.replace(shape, shape=(2, 4, 4, 128))  # All blocks divide the depth.
    np.testing.assert_array_equal(shape.computed(tile, jit=True), shape.expected())


def test_the_arithmetic_does_not_change_with_64_bit_types():
    with jax.enable_x64(True):
        codes = ODD["one_output"].computed()
    np.testing.assert_array_equal(codes, ODD["one_output"].expected())


def test_rounding_is_half_to_even_for_all_kinds_of_float32():
    largest = np.float32(2**22)
    integers = np.arange(-(2**12), 2**12, dtype=np.float32)
    far = np.random.default_rng(0).integers(-(2**22), 2**22, 20_000).astype(np.float32)
    halves = np.concatenate([integers, far]) + np.float32(0.5)
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, 3.4e38, -3.4e38], np.float32)
    x = np.concatenate([integers, halves, bits[~np.isnan(bits)], special])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -np.float32(1e38))])
    rounded = jax.jit(clip_round, static_argnums=(1, 2))(jnp.asarray(x), -(2**22), 2**22)
    np.testing.assert_array_equal(np.asarray(rounded), np.clip(np.rint(x), -largest, largest))
    finite = x[np.isfinite(x)]
    assert (np.abs(finite - np.rint(finite)) == 0.5).sum() > 20_000  # Ties are among them.


def products_that_tie():
    """Return sums and multipliers whose float32 product is k + 1/2, but whose exact product is not.

    A fused multiply-add rounds the exact product, to the other neighbour of k + 1/2.
    """
    rng = np.random.default_rng(0)
    sums = rng.integers(-(2**20), 2**20, 1_000_000).astype(np.float32)
    halves = np.rint(rng.uniform(-100, 100, sums.size)) + 0.5
    multipliers = np.abs(halves / np.where(sums == 0, 1, sums)).astype(np.float32)
    product, true = sums * multipliers, sums.astype(np.float64) * multipliers
    ties = (np.abs(product - np.rint(product)) == 0.5) & (true != product)
    ties &= np.rint(true) != np.rint(product)
    return sums[ties][:4096].astype(np.int32), multipliers[ties][:4096], product[ties][:4096]


def test_the_product_is_rounded_to_float32_before_it_is_rounded_to_an_integer():
    sums, multipliers, products = products_that_tie()
    assert sums.size == 4096
    geometry = Geometry(size=(1, 1), window=(1, 1))
    # With zero weights, the bias is the sum.
    weights, bias = lay_out(
        np.zeros((1, 1, 4, sums.size), np.int8), sums, geometry=geometry, zero_in=0
    )
    codes = convolve(
        jnp.zeros((1, 1, 1, 4), jnp.int8),
        jnp.asarray(weights),
        jnp.asarray(bias),
        jnp.asarray(multipliers),
        geometry=geometry,
        zero_out=0,
        low=-128,
        high=127,
        interpret=True,
    )
    np.testing.assert_array_equal(np.asarray(codes)[0, 0, 0], np.rint(products))


def test_a_branch_is_clipped_before_it_is_added():
    # Three quarters of each code, with many ties, and a branch that is nearly always clipped.
    plus = (-128, 3 * 2**12, 4, -6, 11, 2**13)
    shape = case((5, 5), 16, 16, 3, 1, ONE, -128, plus)
    np.testing.assert_array_equal(shape.computed(), shape.expected())
    # The other term vanishes: the branch alone is seen, from -10 to 7, doubled.
    plus = (127, 1, 4, -6, 11, 2**15)
    alone = case((5, 5), 16, 16, 3, 1, ONE, -128, plus).computed()
    assert set(np.unique(alone)) <= {5 + 2 * branch for branch in range(-10, 8)}
    assert (alone.min(), alone.max()) == (5 - 20, 5 + 14)


@pytest.mark.parametrize(
    ("shape", "weights", "more", "reason"),
    [
        ((1, 8, 4), (3, 4, 8), {}, "1 spatial axes"),
        ((1, 8, 8, 8), (3, 3, 1, 8), {"groups": 8}, "8 groups"),
        ((40_000, 224, 224, 3), (1, 1, 3, 4), {}, "more than 2147483647"),
    ],
    ids=["one_axis", "groups", "too_large"],
)
def test_unsupported_convolutions_have_a_reason(shape, weights, more, reason):
    axes = len(shape) - 2
    arrays = np.ones(weights, np.int8), np.zeros(weights[-1], np.int32)
    options = {"strides": (1,) * axes, "padding": ((0, 0),) * axes, **more}
    assert reason in (unsupported_reason(shape, *arrays, **options) or "")


def test_sums_that_could_saturate_raise_an_error():
    geometry = Geometry(size=(8, 8), window=(1, 1))
    weights = np.full((1, 1, 4, 2), -127, np.int8)
    edge = 2**31 - 1 - 256 * 4 * 127
    options = {"strides": (1, 1), "padding": NONE}
    fits = np.array([edge, -edge], np.int32)
    assert unsupported_reason((1, 8, 8, 4), weights, fits, **options) is None
    beyond = fits + np.array([0, -1], np.int32)
    assert "beyond int32" in (unsupported_reason((1, 8, 8, 4), weights, beyond, **options) or "")
    with pytest.raises(ValueError, match=r"can reach 2147483648, beyond int32"):
        lay_out(weights, beyond, geometry=geometry, zero_in=0)


def test_operands_of_wrong_shapes_raise_an_error():
    shape = case((5, 5), 64, 16, 3, 1, ONE, -128)
    codes, weights, bias, multiplier, _ = shape.operands
    matrix, biases = lay_out(weights, bias, geometry=shape.geometry, zero_in=-128)
    options = {"geometry": shape.geometry, "zero_out": 0, "low": 0, "high": 1, "interpret": True}
    tile = Tile(rows=16, outputs=16, block=128, warps=4, stages=1)
    wrong = [
        ((codes, matrix[:, 1:], biases), {}, r"weights: shape \(16, 575\).*\(16, 576\)"),
        ((codes, matrix, biases[:2]), {}, r"bias: shape \(2, 16\).*\(1, 16\) or \(9, 16\)"),
        ((codes[:, 1:], matrix, biases), {}, r"codes: shape \(1, 4, 5, 64\)"),
        ((codes, matrix, biases), {"tile": tile}, r"tile.block=128 .* depth, 576"),
        (
            (codes, matrix, biases),
            {"residual": _residual(codes[..., :16][:, 1:], 0, 1, 0, -1, 1, 1)},
            r"residual.codes: shape \(1, 4, 5, 16\).*\(1, 5, 5, 16\)",
        ),
    ]
    for arrays, more, message in wrong:
        q, w, b = map(jnp.asarray, arrays)
        with pytest.raises(ValueError, match=message):
            convolve(q, w, b, jnp.asarray(multiplier), **options, **more)

    def run(batch):
        q = jax.ShapeDtypeStruct((batch, 5, 5, 64), jnp.int8)
        w, b = jnp.asarray(matrix), jnp.asarray(biases)
        return jax.eval_shape(lambda q: convolve(q, w, b, jnp.asarray(multiplier), **options), q)

    largest = (2**31 - 1) // (5 * 5 * 64)
    assert run(largest).shape == (largest, 5, 5, 16)
    with pytest.raises(ValueError, match=r"2147484800 codes.*to 2147483647: split the batch"):
        run(largest + 1)
    with pytest.raises(ValueError, match=r"does not fit an input of \(2, 2\)"):
        Geometry(size=(2, 2), window=(3, 3))


@pytest.mark.parametrize("batch", [1, 32, 1024])
@pytest.mark.parametrize("case", params(RESNET18 | ODD))
def test_a_tile_fits_every_shape_and_the_smallest_shared_memory(case, batch):
    geometry, channels = case.geometry, -(-case.shape[-1] // 4) * 4
    depth = padded_depth(geometry.window, channels)
    shape = (batch * math.prod(geometry.output), case.outputs, channels, depth)
    tile = choose_tile(*shape)
    assert depth % tile.block == 0
    assert tile.shared_bytes <= 99 * 1024
    # A tile is not mostly nothing.
    assert tile.rows < 2 * max(shape[0], 16) and tile.outputs < 2 * max(case.outputs, 16)
