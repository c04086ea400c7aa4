"""An int8 convolution and all that follows it in one kernel, for NVIDIA GPUs from sm_80 on.

    acc = sum((q - zero_in) * w)                      int32; a border holds real zeros
    code = clip(R(float32(acc + bias) * multiplier) + zero_out, low, high)

and, where it ends in a residual addition,

    branch = clip(R(float32(acc + bias) * multiplier), branch_low, branch_high)
    code = clip(branch * m_b + R((r - zero_r) * m_r) + zero_out, low, high)

with R round half to even in float32: bit for bit what the other lowerings compute. cuDNN has no
such convolution (per-channel scale, exact rounding) that writes int8, and XLA's writes the sums to
memory as float32, four bytes for every code that is wanted; this one writes the codes.

It is an implicit GEMM in Pallas, lowered by Triton to s8 x s8 -> s32 tensor-core instructions. What
makes it fast was read from the machine code that the compiler makes:

- Weights lie as (outputs, depth): s8 tensor-core operands run along the depth, and any other order
  makes the compiler move every byte by itself.
- A tap that meets the border is a masked load, which asynchronous copies fill with code 0 at no
  cost; filling it with the zero point would bring every operand back to registers. Zero points
  and borders meet in the bias instead, bias - zero_in * (sum of the weights whose taps meet the
  image), made once by `lay_out`: a few rows of biases by the edges that a window crosses.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float32, Int8, Int32

from jaxqat.integer.pallas_tiles import (
    Edges,
    Geometry,
    Tile,
    choose_tile,
    padded_channels,
    padded_depth,
)

COMPUTE_CAPABILITY = (8, 0)  # The smallest: Pallas needs it, older Triton code has no s8 products.

# The sums of a product stay within int32 up to this depth: 2**14 is more than |q * w|, and the
# tensor cores saturate where the true sum would wrap around.
_DEEPEST = 2**31 // 2**14
_LARGEST = 2**31 - 1  # Codes in a tensor: positions are int32.
# Float32 numbers from 2**23 to 2**24 are the integers; this one lies in the middle and is even.
_INTEGERS = np.float32(3 * 2**22)
_INTEGERS_BITS = int(_INTEGERS.view(np.int32))
# Clips the other summand of a residual addition without effect: a branch of up to 64 * 128 and a
# zero point of 128 cannot bring such a sum back among the codes.
_FAR = 2**15

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Residual:
    """The end of a residual block: what is added to the convolution, and how.

    Attributes:
        codes: int8, of the output's shape.
        zero_point: Code of their real zero.
        multiplier: float32, their scale over the output's.
        branch_low: Smallest code of the convolution's own result, whose zero point is 0.
        branch_high: Largest.
        branch_multiplier: That result's scale over the output's, a small positive integer.
    """

    codes: Int8[Array, "n h2 w2 o"]
    zero_point: int
    multiplier: np.float32
    branch_low: int
    branch_high: int
    branch_multiplier: int = 1

    def __post_init__(self):
        if self.branch_multiplier not in range(1, 65):
            raise ValueError(
                "a residual's branch_multiplier must be an integer from 1 to 64, got "
                f"{self.branch_multiplier!r}."
            )


def supported(
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    *,
    strides: tuple[int, ...],
    padding: tuple[Pair, ...],
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
) -> str | None:
    """Why the kernel cannot compute a convolution; None if it can.

    Args:
        shape: Of the codes, (n, h, w, c).
        weights: Shape of the weights, (kh, kw, c, o).
        strides: By spatial axis.
        padding: Before and after each spatial axis.
        dilation: By spatial axis; None is 1.
        groups: Of channels.
    """
    if len(shape) != 4 or len(weights) != 4:
        return f"it has {len(weights) - 2} spatial axes, not 2"
    if groups != 1:
        return f"it has {groups} groups of channels"
    window, channels = (weights[0], weights[1]), weights[2]
    depth = padded_depth(window, channels)
    if depth > _DEEPEST:
        return f"its sums have {depth} terms, more than {_DEEPEST}"
    geometry = _geometry(shape[1:3], window, strides, padding, dilation or (1, 1))
    codes_in = math.prod(shape[:3]) * padded_channels(channels)
    codes_out = shape[0] * math.prod(geometry.output) * weights[3]
    if max(codes_in, codes_out) > _LARGEST:
        return f"a tensor of {max(codes_in, codes_out)} codes has more than {_LARGEST}"
    return None


def lay_out(
    weights: Int8[np.ndarray, "kh kw c o"],
    bias: Int32[np.ndarray, "o"],
    *,
    size: Pair,
    strides: Pair,
    padding: Padding,
    dilation: Pair = (1, 1),
    zero_in: int,
) -> tuple[Int8[np.ndarray, "o depth"], Int32[np.ndarray, "edges o"]]:
    """The weights and biases that `convolve` reads, made once when a network is built.

    Args:
        weights: Of the convolution.
        bias: Of the convolution, in accumulator units.
        size: Height and width of the input.
        strides: By axis.
        padding: Before and after each axis.
        dilation: By axis.
        zero_in: Zero point of the input.

    Returns:
        The weights, one output channel after the other, each padded with zeros to whole blocks;
        and bias - zero_in * sum(weights of the taps that meet the image) by the edges that a
        window crosses, or in one row if no window crosses any or the zero point is 0.
    """
    *window, channels, outputs = weights.shape
    geometry = _geometry(size, window, strides, padding, dilation)
    taps = np.zeros((outputs, *window, padded_channels(channels)), np.int8)
    taps[..., :channels] = np.moveaxis(weights, -1, 0)
    taps = taps.reshape(outputs, -1)
    depth = padded_depth(geometry.window, channels)
    matrix = np.pad(taps, ((0, 0), (0, depth - taps.shape[1])))
    sums = weights.sum(2, dtype=np.int64)
    if zero_in == 0:
        met = np.zeros((1, outputs), np.int64)
    else:
        rows, columns = (geometry.taps_inside(axis).astype(np.int64) for axis in (0, 1))
        met = np.einsum("ri,cj,ijo->rco", rows, columns, sums).reshape(-1, outputs)
    # In int64, then taken modulo 2**32: the kernel's int32 sum with acc is exact whenever the
    # sum itself fits int32, which the graph has checked.
    return matrix, (bias.astype(np.int64) - zero_in * met).astype(np.int32)


def convolve(
    codes: Int8[Array, "n h w c"],
    weights: Int8[Array, "o depth"],
    bias: Int32[Array, "edges o"],
    multiplier: Float32[Array, "o"],
    *,
    window: Pair,
    strides: Pair = (1, 1),
    padding: Padding = ((0, 0), (0, 0)),
    dilation: Pair = (1, 1),
    zero_out: int,
    low: int,
    high: int,
    residual: Residual | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Int8[Array, "n h2 w2 o"]:
    """Codes of a convolution, by the equations at the head of this module.

    Channels that are no multiple of four (the three of an image) are padded outside of the kernel,
    which XLA fuses into whatever makes the codes; nothing else is ever padded or copied.

    Args:
        codes: The input.
        weights: As `lay_out` made them.
        bias: As `lay_out` made them, the input's zero point and the borders included.
        multiplier: float32, by output channel.
        window: Height and width of the kernel.
        strides: By axis.
        padding: Before and after each axis.
        dilation: By axis.
        zero_out: Zero point of the output.
        low: Smallest code of the output.
        high: Largest.
        residual: What is added, if the convolution ends a residual block.
        tile: How to cut the work; None chooses by the shapes.
        interpret: Whether to run it as JAX operations, on any device, to test it.

    Returns:
        The output's codes.
    """
    geometry = _geometry(codes.shape[1:3], window, strides, padding, dilation)
    channels = padded_channels(codes.shape[3])
    plan = _Plan(
        geometry=geometry,
        batch=codes.shape[0],
        channels=channels,
        outputs=weights.shape[0],
        depth=padded_depth(window, channels),
        tile=tile,
        bias_rows=bias.shape[0],
        zero_out=zero_out,
        low=low,
        high=high,
        residual=residual,
    )
    _check_operands(plan, weights.shape, bias.shape)
    codes = jnp.pad(codes, ((0, 0), (0, 0), (0, 0), (0, channels - codes.shape[3])))
    rows = () if residual is None else (residual.codes.reshape(plan.rows, plan.outputs),)
    out = pl.pallas_call(
        partial(_kernel, plan),
        grid=(plan.row_tiles * plan.output_tiles,),
        out_shape=jax.ShapeDtypeStruct((plan.rows, plan.outputs), jnp.int8),
        compiler_params=plgpu.CompilerParams(num_warps=plan.cut.warps, num_stages=plan.cut.stages),
        interpret=interpret,
        name="int8_convolution",
    )(codes.reshape(-1), weights, bias, multiplier, *rows)
    return out.reshape(plan.batch, *geometry.output, plan.outputs)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Plan:
    """What the kernel knows when it is compiled."""

    geometry: Geometry
    batch: int
    channels: int
    outputs: int
    depth: int
    tile: Tile | None
    bias_rows: int
    zero_out: int
    low: int
    high: int
    residual: Residual | None

    @property
    def rows(self) -> int:
        return self.batch * math.prod(self.geometry.output)

    @property
    def cut(self) -> Tile:
        return self.tile or choose_tile(self.rows, self.outputs, self.channels, self.depth)

    @property
    def row_tiles(self) -> int:
        return pl.cdiv(self.rows, self.cut.rows)

    @property
    def output_tiles(self) -> int:
        return pl.cdiv(self.outputs, self.cut.outputs)

    @property
    def masked(self) -> bool:
        """Whether a tap can miss the image, one that fills the depth up included."""
        taps = math.prod(self.geometry.window)
        return not self.geometry.inside or self.depth != taps * self.channels


def clip_round(x: Float32[Array, "..."], low: int, high: int) -> Int32[Array, "..."]:
    """clip(R(x), low, high) as int32, R rounding half to even; bounds within +-2**22.

    Rounding keeps order and integers, so clipping may come first; then x + 1.5 * 2**23 lies where
    float32 holds the integers and no others, the addition itself rounds (half to even, as all
    float32 arithmetic does), and the integer stands in the low bits of the sum. `round` has no
    Triton lowering. Subtracting 1.5 * 2**23 again would be exact too, but XLA's simplifier, which
    the interpreter goes through, cancels it. The clipping also stands between a product that makes
    x and the addition, so that no compiler can contract them into one rounding.
    """
    x = jnp.minimum(jnp.maximum(x, np.float32(low)), np.float32(high))
    return lax.bitcast_convert_type(x + _INTEGERS, jnp.int32) - _INTEGERS_BITS


def _kernel(plan: _Plan, x_ref, w_ref, b_ref, m_ref, *refs: Any) -> None:
    """One tile of the output; tiles of the same pixels follow one another and share their codes."""
    tile, (*r_refs, o_ref) = plan.cut, refs
    program = pl.program_id(0)
    row = lax.div(program, plan.output_tiles) * tile.rows
    column = lax.rem(program, plan.output_tiles) * tile.outputs
    rows, columns = pl.ds(row, tile.rows), pl.ds(column, tile.outputs)
    in_columns = _within(column, tile.outputs, plan.outputs)
    in_tile = _outer(_within(row, tile.rows, plan.rows), in_columns, (tile.rows, tile.outputs))

    acc = _accumulate(plan, x_ref, w_ref, row, column)
    acc = acc + _bias(plan, b_ref, row, column)
    multiplier = plgpu.load(m_ref.at[columns], mask=in_columns)
    # int32 to float32 rounds once, the product once more; neither with what follows.
    real = acc.astype(jnp.float32) * multiplier[None, :]
    others = (plgpu.load(r_ref.at[rows, columns], mask=in_tile) for r_ref in r_refs)
    plgpu.store(o_ref.at[rows, columns], _requantize(plan, real, *others), mask=in_tile)


def _accumulate(plan: _Plan, x_ref, w_ref, row: Array, column: Array) -> Int32[Array, "m o"]:
    """Sums of code times weight over the depth; what lies outside of the image counts as code 0."""
    geometry, tile, channels = plan.geometry, plan.cut, plan.channels
    height, width = geometry.size
    image, y, x = _pixels(plan, row)
    top = y * geometry.strides[0] - geometry.padding[0][0]
    left = x * geometry.strides[1] - geometry.padding[1][0]
    origin = ((image * height + top) * width + left) * channels
    lane = lax.iota(jnp.int32, tile.block)
    one_tap = channels % tile.block == 0  # In each block; then its position is a scalar.
    in_columns = _within(column, tile.outputs, plan.outputs)
    weights_mask = _outer(in_columns, None, (tile.outputs, tile.block))

    def body(i, acc):
        k = i * tile.block if one_tap else i * tile.block + lane
        tap = lax.div(k, jnp.int32(channels))
        channel = k - tap * channels
        tap_row = lax.div(tap, jnp.int32(geometry.window[1]))
        down = tap_row * geometry.dilation[0]
        right = (tap - tap_row * geometry.window[1]) * geometry.dilation[1]
        shift = (down * width + right) * channels + channel + (lane if one_tap else 0)
        mask = other = None
        if plan.masked:
            v, h = top[:, None] + down, left[:, None] + right
            mask = (v >= 0) & (v < height) & (h >= 0) & (h < width)
            mask, other = jnp.broadcast_to(mask, (tile.rows, tile.block)), np.int8(0)
        a = plgpu.load(x_ref.at[origin[:, None] + shift], mask=mask, other=other)
        block = w_ref.at[pl.ds(column, tile.outputs), pl.ds(i * tile.block, tile.block)]
        b = plgpu.load(block, mask=weights_mask)
        dimensions = (((1,), (1,)), ((), ()))
        return acc + lax.dot_general(a, b, dimensions, preferred_element_type=jnp.int32)

    zeros = jnp.zeros((tile.rows, tile.outputs), jnp.int32)
    return lax.fori_loop(0, plan.depth // tile.block, body, zeros)


def _bias(plan: _Plan, b_ref, row: Array, column: Array) -> Int32[Array, "m o"]:
    """The bias of each sum; only pixels whose window crosses an edge read one of their own."""
    tile, columns = plan.cut, pl.ds(column, plan.cut.outputs)
    in_columns = _within(column, tile.outputs, plan.outputs)
    if plan.bias_rows == 1:
        return plgpu.load(b_ref.at[0, columns], mask=in_columns)[None, :]
    _, y, x = _pixels(plan, row)
    vertical, horizontal = plan.geometry.edges
    edge = _class(vertical, y) * horizontal.count + _class(horizontal, x)
    inner = vertical.before * horizontal.count + horizontal.before
    shape = (tile.rows, tile.outputs)
    usual = plgpu.load(b_ref.at[min(inner, plan.bias_rows - 1), columns], mask=in_columns)
    channel = column + lax.iota(jnp.int32, tile.outputs)
    return plgpu.load(
        b_ref.at[edge[:, None], channel[None, :]],
        mask=_outer(edge != inner, in_columns, shape),
        other=jnp.broadcast_to(usual[None, :], shape),
    )


def _requantize(plan: _Plan, real: Float32[Array, "m o"], *others: Array) -> Int8[Array, "m o"]:
    """Codes of the real numbers in units of the output's scale, and of what is added to them."""
    zero, residual = plan.zero_out, plan.residual
    if residual is None:
        codes = clip_round(real, plan.low - zero, plan.high - zero) + zero
        return codes.astype(jnp.int8)
    branch = clip_round(real, residual.branch_low, residual.branch_high)
    (other,) = others
    centred = (other.astype(jnp.int32) - residual.zero_point).astype(jnp.float32)
    other = clip_round(centred * np.float32(residual.multiplier), -_FAR, _FAR)
    codes = branch * residual.branch_multiplier + other + zero
    return jnp.minimum(jnp.maximum(codes, plan.low), plan.high).astype(jnp.int8)


def _pixels(plan: _Plan, row: Array) -> tuple[Array, Array, Array]:
    """Image, row and column of a tile's output pixels; the last one again beyond the end."""
    height, width = plan.geometry.output
    pixel = jnp.minimum(row + lax.iota(jnp.int32, plan.cut.rows), plan.rows - 1)
    line = lax.div(pixel, jnp.int32(width))
    image = lax.div(line, jnp.int32(height))
    return image, line - image * height, pixel - line * width


def _class(edges: Edges, position: Array) -> Array:
    return jnp.minimum(position, edges.before) + jnp.maximum(position - (edges.after - 1), 0)


def _within(start: Array, size: int, end: int) -> Bool[Array, "size"] | None:
    """Which of `size` positions lie before the end; None if the end is that of a tile."""
    return None if end % size == 0 else start + lax.iota(jnp.int32, size) < end


def _outer(rows: Array | None, columns: Array | None, shape: Pair) -> Bool[Array, "m o"] | None:
    """Mask of a tile from those of its rows and columns."""
    masks = [] if rows is None else [rows[:, None]]
    masks += [] if columns is None else [columns[None, :]]
    return jnp.broadcast_to(math.prod(masks[1:], start=masks[0]), shape) if masks else None


def _geometry(size, window, strides, padding, dilation) -> Geometry:
    return Geometry(
        size=tuple(size), window=window, strides=strides, padding=padding, dilation=dilation
    )


def _check_operands(plan: _Plan, weights: Pair, bias: Pair) -> None:
    wanted = (plan.outputs, plan.depth)
    if weights != wanted:
        raise ValueError(
            f"weights of shape {weights} were not laid out for this convolution; right would be "
            f"{wanted}, as lay_out makes them."
        )
    vertical, horizontal = plan.geometry.edges
    rows = (1, vertical.count * horizontal.count)
    if bias[0] not in rows or bias[1:] != (plan.outputs,):
        raise ValueError(
            f"biases of shape {bias} were not laid out for this convolution; right would be "
            f"{rows[0]} or {rows[1]} rows of {plan.outputs}, as lay_out makes them."
        )
    if plan.residual is not None:
        wanted = (plan.batch, *plan.geometry.output, plan.outputs)
        if plan.residual.codes.shape != wanted:
            raise ValueError(
                f"residual codes of shape {plan.residual.codes.shape} were added to an output of "
                f"shape {wanted}."
            )
