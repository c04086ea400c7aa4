"""An int8 convolution and all that follows it in one kernel, for NVIDIA GPUs from sm_80 on.

    acc = sum((q - zero_in) * w)                      int32; a border holds real zeros
    code = clip(R(float32(acc + bias) * multiplier) + zero_out, low, high)

and, where it ends in a residual addition,

    branch = clip(R(float32(acc + bias) * multiplier), branch_low, branch_high)
    code = clip(branch * m_b + R((r - zero_r) * m_r) + zero_out, low, high)

with R round half to even in float32: bit for bit what the other lowerings compute. cuDNN has no
convolution with a scale per channel and this rounding that writes int8; through it, XLA writes the
sums to memory as float32, four bytes for every code that is wanted. This kernel writes the codes.

It is an implicit GEMM (`pallas_tiles`) in Pallas, which Triton lowers to s8 x s8 -> s32 tensor-core
instructions. Its form follows what the compiler makes of it:

- Weights lie as (outputs, depth): s8 operands of tensor cores run along the depth, and from any
  other order the compiler gathers them byte by byte.
- A tap outside of the image is a masked load, which asynchronous copies fill with code 0 at no
  cost; to fill it with the zero point would bring every operand back to registers. The zero point
  is in the bias instead, minus the taps that a window loses at the edges (`pallas_tiles.lay_out`).
- The sums start from the bias, which costs no registers; added at the end, it takes as many again.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float32, Int8, Int32

from jaxqat.integer._execute.pallas_tiles import (
    LARGEST_TENSOR,
    Edges,
    Geometry,
    Tile,
    choose_tile,
    padded_channels,
    padded_depth,
)

COMPUTE_CAPABILITY = (8, 0)  # The smallest that Pallas compiles for.

# From 2**23 to 2**24, float32 holds the integers and nothing between; this lies in the middle.
_INTEGERS = np.float32(3 * 2**22)
_INTEGERS_BITS = int(_INTEGERS.view(np.int32))
# A summand beyond this decides the code alone: a branch has at most 64 * 128, a zero point 128.
_FAR = 2**15


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Residual:
    """The end of a residual block: what is added to the convolution, and how.

    Attributes:
        codes: int8, of the output's shape.
        zero_point: Code of their real zero.
        multiplier: float32, their scale over the output's.
        branch_low: Smallest code of the convolution's own result, whose zero point is 0.
        branch_high: Largest.
        branch_multiplier: That result's scale over the output's, an integer from 1 to 64.
    """

    codes: Int8[Array, "n h2 w2 o"]
    zero_point: int
    multiplier: np.float32
    branch_low: int
    branch_high: int
    branch_multiplier: float = 1

    def __post_init__(self):
        if self.branch_multiplier not in range(1, 65):
            raise ValueError(
                "a residual's branch_multiplier must be an integer from 1 to 64, got "
                f"{self.branch_multiplier!r}."
            )


def convolve(
    codes: Int8[Array, "n h w c"],
    weights: Int8[Array, "o depth"],
    bias: Int32[Array, "edges o"],
    multiplier: Float32[Array, "o"],
    *,
    geometry: Geometry,
    zero_out: int,
    low: int,
    high: int,
    residual: Residual | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Int8[Array, "n h2 w2 o"]:
    """Codes of a convolution, by the equations at the head of this module.

    Any batch, size, window and number of channels; `pallas_tiles.supported` names what is beyond
    it. Input channels that are no multiple of four (the three of an image) are padded before the
    kernel, which XLA fuses into whatever makes those codes; nothing else is padded or copied.

    Args:
        codes: The input.
        weights: As `pallas_tiles.lay_out` made them.
        bias: As `pallas_tiles.lay_out` made them, with the input's zero point and the borders.
        multiplier: By output channel.
        geometry: Of the convolution.
        zero_out: Zero point of the output.
        low: Smallest code of the output.
        high: Largest.
        residual: What is added, if the convolution ends a residual block.
        tile: How to cut the work; None chooses by the shapes.
        interpret: Whether to run as JAX operations, on any device, to test the kernel.

    Returns:
        The output's codes.

    Raises:
        ValueError: If the operands do not fit each other.
    """
    batch, outputs, channels = codes.shape[0], weights.shape[0], padded_channels(codes.shape[3])
    depth, rows = padded_depth(geometry.window, channels), batch * math.prod(geometry.output)
    plan = _Plan(
        geometry=geometry,
        rows=rows,
        channels=channels,
        outputs=outputs,
        depth=depth,
        bias_rows=bias.shape[0],
        tile=tile or choose_tile(rows, outputs, channels, depth),
        zero_out=int(zero_out),
        low=int(low),
        high=int(high),
        residual=residual,
    )
    _check(plan, codes, weights, bias)
    if channels > codes.shape[3]:
        codes = jnp.pad(codes, ((0, 0), (0, 0), (0, 0), (0, channels - codes.shape[3])))
    others = () if residual is None else (residual.codes.reshape(rows, outputs),)
    made = pl.pallas_call(
        partial(_kernel, plan),
        grid=(plan.row_tiles * plan.output_tiles,),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.int8),
        compiler_params=plgpu.CompilerParams(
            num_warps=plan.tile.warps, num_stages=plan.tile.stages
        ),
        interpret=interpret,
        name="int8_convolution",
    )(codes.reshape(-1), weights, bias, multiplier, *others)
    return made.reshape(batch, *geometry.output, outputs)


def clip_round(x: Float32[Array, "..."], low: int, high: int) -> Int32[Array, "..."]:
    """clip(R(x), low, high) as int32, R rounding half to even; for bounds within +-2**22.

    Rounding keeps order and integers, so the clipping may come first. Then x + 1.5 * 2**23 lies
    where float32 holds the integers and nothing between: the addition itself rounds, half to even,
    and the integer stands in the low bits of the sum. (`round` has no Triton lowering; subtracting
    1.5 * 2**23 again would be as exact, but XLA's simplifier cancels the two.) The clipping also
    stands between a product that makes x and the addition, so that no compiler can contract them
    to a fused multiply-add, which would round once where the equation rounds twice.
    """
    x = jnp.minimum(jnp.maximum(x, np.float32(low)), np.float32(high))
    return lax.bitcast_convert_type(x + _INTEGERS, jnp.int32) - _INTEGERS_BITS


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Plan:
    """What the kernel knows when it is compiled: sizes as laid out, the tile, the epilogue."""

    geometry: Geometry
    rows: int
    channels: int
    outputs: int
    depth: int
    bias_rows: int
    tile: Tile
    zero_out: int
    low: int
    high: int
    residual: Residual | None

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // self.tile.rows)

    @property
    def output_tiles(self) -> int:
        return -(-self.outputs // self.tile.outputs)

    @property
    def masked(self) -> bool:
        """Whether a tap can miss the image; those that only fill the depth up may, too."""
        taps = math.prod(self.geometry.window)
        return not self.geometry.inside or self.depth != taps * self.channels


def _kernel(plan: _Plan, x_ref, w_ref, b_ref, m_ref, *refs) -> None:
    """One tile of the output; the tiles of the same pixels are neighbours and share their codes."""
    tile, (*r_refs, o_ref) = plan.tile, refs
    program = pl.program_id(0)
    row = lax.div(program, np.int32(plan.output_tiles)) * tile.rows
    column = lax.rem(program, np.int32(plan.output_tiles)) * tile.outputs
    rows, columns = pl.ds(row, tile.rows), pl.ds(column, tile.outputs)
    in_columns = _before_end(column, tile.outputs, plan.outputs)
    in_rows = _before_end(row, tile.rows, plan.rows)
    in_tile = _outer_mask(in_rows, in_columns, (tile.rows, tile.outputs))

    sums = _accumulate(plan, _bias(plan, b_ref, row, column), x_ref, w_ref, row, column)
    multiplier = plgpu.load(m_ref.at[columns], mask=in_columns)
    real = sums.astype(jnp.float32) * multiplier[None, :]
    others = (plgpu.load(r_ref.at[rows, columns], mask=in_tile) for r_ref in r_refs)
    plgpu.store(o_ref.at[rows, columns], _requantize(plan, real, *others), mask=in_tile)


def _bias(plan: _Plan, b_ref, row: Array, column: Array) -> Int32[Array, "m o"]:
    """The bias of each sum; only pixels whose window crosses an edge read one of their own."""
    tile, columns = plan.tile, pl.ds(column, plan.tile.outputs)
    shape = (tile.rows, tile.outputs)
    vertical, horizontal = plan.geometry.edges
    inner = vertical.before * horizontal.count + horizontal.before
    inner = min(inner, plan.bias_rows - 1)  # Without inner pixels, it stands for the last one.
    in_columns = _before_end(column, tile.outputs, plan.outputs)
    usual = plgpu.load(
        b_ref.at[pl.ds(inner, 1), columns], mask=_outer_mask(None, in_columns, (1, tile.outputs))
    )
    usual = jnp.broadcast_to(usual, shape)
    if plan.bias_rows == 1:
        return usual
    _, y, x = _pixels(plan, row)
    edge = _edge_class(vertical, y) * horizontal.count + _edge_class(horizontal, x)
    channel = column + lax.iota(jnp.int32, tile.outputs)
    mask = _outer_mask(edge != inner, in_columns, shape)
    return plgpu.load(b_ref.at[edge[:, None], channel[None, :]], mask=mask, other=usual)


def _accumulate(
    plan: _Plan, bias: Array, x_ref, w_ref, row: Array, column: Array
) -> Int32[Array, "m o"]:
    """The sums bias + sum(q * w), where a tap outside of the image has code 0."""
    tile, depth = plan.tile, plan.tile.block
    codes_at = _codes_at(plan, row)
    in_columns = _before_end(column, tile.outputs, plan.outputs)
    weights_mask = _outer_mask(in_columns, None, (tile.outputs, depth))

    def add_block(i: Array, acc: Array) -> Array:
        start = i.astype(jnp.int32) * depth  # With jax_enable_x64, a loop counts in int64.
        position, mask = codes_at(start)
        q = plgpu.load(x_ref.at[position], mask=mask, other=None if mask is None else np.int8(0))
        block = w_ref.at[pl.ds(column, tile.outputs), pl.ds(start, depth)]
        w = plgpu.load(block, mask=weights_mask)
        along_depth = (((1,), (1,)), ((), ()))
        return acc + lax.dot_general(q, w, along_depth, preferred_element_type=jnp.int32)

    return lax.fori_loop(0, plan.depth // depth, add_block, bias)


def _codes_at(plan: _Plan, row: Array):
    """A function from a block's depth to the positions of its codes, and a mask or None."""
    geometry, tile, channels = plan.geometry, plan.tile, plan.channels
    height, width = geometry.size
    image, y, x = _pixels(plan, row)
    top = y * geometry.strides[0] - geometry.padding[0][0]
    left = x * geometry.strides[1] - geometry.padding[1][0]
    origin = ((image * height + top) * width + left) * channels
    lane = lax.iota(jnp.int32, tile.block)
    # Where a block lies within one tap, the tap is a scalar; else each lane has its own.
    scalar = channels % tile.block == 0

    def codes_at(depth: Array) -> tuple[Array, Array | None]:
        k = depth if scalar else depth + lane
        tap = lax.div(k, np.int32(channels))
        channel = k - tap * channels + (lane if scalar else 0)
        tap_row = lax.div(tap, np.int32(geometry.window[1]))
        down = tap_row * geometry.dilation[0]
        right = (tap - tap_row * geometry.window[1]) * geometry.dilation[1]
        position = origin[:, None] + ((down * width + right) * channels + channel)
        if not plan.masked:
            return position, None
        v, h = top[:, None] + down, left[:, None] + right
        inside = (v >= 0) & (v < height) & (h >= 0) & (h < width)
        return position, jnp.broadcast_to(inside, position.shape)

    return codes_at


def _requantize(plan: _Plan, real: Float32[Array, "m o"], *others: Array) -> Int8[Array, "m o"]:
    """Codes of sums in units of the scale after them, and of what is added."""
    zero, residual = plan.zero_out, plan.residual
    if residual is None:
        return (clip_round(real, plan.low - zero, plan.high - zero) + zero).astype(jnp.int8)
    branch = clip_round(real, residual.branch_low, residual.branch_high)
    (other,) = others
    centred = (other.astype(jnp.int32) - int(residual.zero_point)).astype(jnp.float32)
    other = clip_round(centred * np.float32(residual.multiplier), -_FAR, _FAR)
    codes = branch * int(residual.branch_multiplier) + other + zero
    return jnp.minimum(jnp.maximum(codes, plan.low), plan.high).astype(jnp.int8)


def _pixels(plan: _Plan, row: Array) -> tuple[Array, Array, Array]:
    """Image, row and column of a tile's output pixels; beyond the end, the last one again."""
    height, width = plan.geometry.output
    pixel = jnp.minimum(row + lax.iota(jnp.int32, plan.tile.rows), plan.rows - 1)
    line = lax.div(pixel, np.int32(width))
    image = lax.div(line, np.int32(height))
    return image, line - image * height, pixel - line * width


def _edge_class(edges: Edges, position: Array) -> Array:
    """Number of a position's class."""
    return jnp.minimum(position, edges.before) + jnp.maximum(position - (edges.after - 1), 0)


def _before_end(start: Array, size: int, end: int) -> Bool[Array, "size"] | None:
    """Which of `size` positions lie before the end; None if every tile ends there or before."""
    return None if end % size == 0 else start + lax.iota(jnp.int32, size) < end


def _outer_mask(rows: Array | None, columns: Array | None, shape: tuple[int, int]) -> Array | None:
    """Mask of a tile from masks of its rows and of its columns."""
    if rows is None:
        return None if columns is None else jnp.broadcast_to(columns[None, :], shape)
    mask = rows[:, None] if columns is None else rows[:, None] & columns[None, :]
    return jnp.broadcast_to(mask, shape)


def _check(plan: _Plan, codes: Array, weights: Array, bias: Array) -> None:
    if plan.depth % plan.tile.block:
        raise ValueError(f"tile.block={plan.tile.block} does not divide the depth, {plan.depth}.")
    largest = max(math.prod(codes.shape[:3]) * plan.channels, plan.rows * plan.outputs)
    if largest > LARGEST_TENSOR:
        raise ValueError(
            f"a batch of {codes.shape[0]} makes a tensor of {largest} codes; the kernel counts to "
            f"{LARGEST_TENSOR}: split the batch."
        )
    vertical, horizontal = plan.geometry.edges
    edges = vertical.count * horizontal.count
    wanted = {
        "codes": (codes, ((codes.shape[0], *plan.geometry.size, codes.shape[3]),)),
        "weights": (weights, ((plan.outputs, plan.depth),)),
        "bias": (bias, ((1, plan.outputs), (edges, plan.outputs))),
    }
    if plan.residual is not None:
        output = (codes.shape[0], *plan.geometry.output, plan.outputs)
        wanted["residual.codes"] = (plan.residual.codes, (output,))
    for name, (array, shapes) in wanted.items():
        if array.shape not in shapes:
            raise ValueError(
                f"{name}: shape {array.shape}; right for this convolution would be "
                f"{' or '.join(map(str, shapes))} (weights and bias as lay_out makes them)."
            )
