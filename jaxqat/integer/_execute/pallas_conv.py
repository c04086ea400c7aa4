"""An int8 convolution with its requantization in one kernel, for NVIDIA GPUs from sm_80 on.

    acc = sum((q - zero_in) * w)                      int32; padding holds real zeros
    code = clip(R(float32(acc + bias) * multiplier) + zero_out, low, high)

and with a residual addition,

    branch = clip(R(float32(acc + bias) * multiplier) + zero_b, branch_low, branch_high)
    code = clip(R((branch - zero_b) * m_b + (r - zero_r) * m_r + zero_out), low, high)

where R rounds half to even in float32. The codes are bit for bit those of the other platforms.
cuDNN has no int8 output with a scale per channel and this rounding, so XLA writes float32
accumulators to memory, four bytes per code. This kernel writes the codes.

It is an implicit GEMM (`pallas_tiles`) in Pallas, which Triton lowers to s8 x s8 -> s32 tensor-core
instructions. Three choices are due to the compiler:

- Weights are laid out as (outputs, depth). Tensor cores read s8 operands along the depth; from any
  other order the compiler gathers them byte by byte.
- A tap outside of the image is a masked load, which asynchronous copies fill with code 0 at no
  cost. Filling in the zero point would bring every operand back to registers. So the bias contains
  the zero point instead, summed over the taps inside of the image (`pallas_tiles.lay_out`).
- The accumulator starts from the bias. Adding the bias at the end would double the registers.
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

from jaxqat.errors import ExecutionError
from jaxqat.integer._execute.pallas_tiles import (
    LARGEST_TENSOR,
    Edges,
    Geometry,
    Tile,
    choose_tile,
    padded_channels,
    padded_depth,
)

COMPUTE_CAPABILITY = (8, 0)  # Minimum of Pallas.

# From 2**23 to 2**24, float32 holds exactly the integers; this is the middle.
_INTEGERS = np.float32(3 * 2**22)
_INTEGERS_BITS = int(_INTEGERS.view(np.int32))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Residual:
    """The shortcut of a residual block, and how the kernel adds it to the convolution's branch.

    Attributes:
        codes: int8 codes of the shortcut, of the output's shape.
        zero_point: Zero point of the shortcut.
        multiplier: Dyadic float32, scale of the shortcut over that of the output (`graph.Add`).
        branch_zero_point: Zero point of the branch.
        branch_low: Smallest code of the branch.
        branch_high: Largest code of the branch.
        branch_multiplier: Dyadic float32, scale of the branch over that of the output.
    """

    codes: Int8[Array, "n h2 w2 o"]
    zero_point: int
    multiplier: np.float32
    branch_zero_point: int
    branch_low: int
    branch_high: int
    branch_multiplier: np.float32


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
    """Return the codes of a convolution, by the equations of this module's docstring.

    It supports any batch, size, window and number of channels, up to the limits in
    `pallas_tiles.unsupported_reason`. Input channels are padded to a multiple of four before the
    kernel (such as the three of an image); XLA fuses this into the operation before. Nothing else
    is padded or copied.

    Args:
        codes: Codes of the input.
        weights: Weights from `pallas_tiles.lay_out`.
        bias: Biases from `pallas_tiles.lay_out`, which include the input's zero point.
        multiplier: Multiplier of each output channel.
        geometry: Geometry of the convolution.
        zero_out: Zero point of the output.
        low: Smallest code of the output.
        high: Largest code of the output.
        residual: Shortcut to add, if the convolution ends a residual block.
        tile: Tile of a thread block; None chooses one by the shapes.
        interpret: Whether to run as JAX operations on any device, for tests.

    Returns:
        Codes of the output.

    Raises:
        ExecutionError: If the operands' shapes do not match, or a tensor is too large.
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
    result = pl.pallas_call(
        partial(_kernel, plan),
        grid=(plan.row_tiles * plan.output_tiles,),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.int8),
        compiler_params=plgpu.CompilerParams(
            num_warps=plan.tile.warps, num_stages=plan.tile.stages
        ),
        interpret=interpret,
        name="int8_convolution",
    )(codes.reshape(-1), weights, bias, multiplier, *others)
    return result.reshape(batch, *geometry.output, outputs)


def clip_round(x: Float32[Array, "..."], low: int, high: int) -> Int32[Array, "..."]:
    """Return clip(R(x), low, high) as int32, where R rounds half to even; bounds within +-2**22.

    Rounding is monotonic and keeps integers, so clipping may come first. Then x + 1.5 * 2**23 is in
    the range where float32 holds exactly the integers: the addition rounds half to even, and the
    integer is in the low bits of the sum. (`round` has no Triton lowering. Subtracting 1.5 * 2**23
    would be exact too, but XLA's simplifier cancels it with the addition.) The clipping also
    separates the addition from a product that computes x, so that no compiler can fuse them into a
    multiply-add, which would round once instead of twice.
    """
    x = jnp.minimum(jnp.maximum(x, np.float32(low)), np.float32(high))
    return lax.bitcast_convert_type(x + _INTEGERS, jnp.int32) - _INTEGERS_BITS


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Plan:
    """Compile-time constants of the kernel: sizes as laid out, the tile, the requantization."""

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
        """Whether loads need a mask: a tap can lie outside of the image, or only pads the depth."""
        taps = math.prod(self.geometry.window)
        return not self.geometry.inside or self.depth != taps * self.channels


def _kernel(plan: _Plan, x_ref, w_ref, b_ref, m_ref, *refs) -> None:
    """Compute one tile of the output; tiles of the same pixels are adjacent and share codes."""
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
    """Return the bias of each sum: the inner one, unless the pixel's window crosses an edge."""
    tile, columns = plan.tile, pl.ds(column, plan.tile.outputs)
    shape = (tile.rows, tile.outputs)
    vertical, horizontal = plan.geometry.edges
    inner = vertical.before * horizontal.count + horizontal.before
    inner = min(inner, plan.bias_rows - 1)  # There may be no inner pixels.
    in_columns = _before_end(column, tile.outputs, plan.outputs)
    inner_bias = plgpu.load(
        b_ref.at[pl.ds(inner, 1), columns], mask=_outer_mask(None, in_columns, (1, tile.outputs))
    )
    inner_bias = jnp.broadcast_to(inner_bias, shape)
    if plan.bias_rows == 1:
        return inner_bias
    _, y, x = _pixels(plan, row)
    edge = _edge_class(vertical, y) * horizontal.count + _edge_class(horizontal, x)
    channel = column + lax.iota(jnp.int32, tile.outputs)
    mask = _outer_mask(edge != inner, in_columns, shape)
    return plgpu.load(b_ref.at[edge[:, None], channel[None, :]], mask=mask, other=inner_bias)


def _accumulate(
    plan: _Plan, bias: Array, x_ref, w_ref, row: Array, column: Array
) -> Int32[Array, "m o"]:
    """Return bias + sum(q * w), where a tap outside of the image has code 0."""
    tile, depth = plan.tile, plan.tile.block
    codes_at = _codes_at(plan, row)
    in_columns = _before_end(column, tile.outputs, plan.outputs)
    weights_mask = _outer_mask(in_columns, None, (tile.outputs, depth))

    def add_block(i: Array, acc: Array) -> Array:
        start = i.astype(jnp.int32) * depth  # int64 with jax_enable_x64.
        position, mask = codes_at(start)
        q = plgpu.load(x_ref.at[position], mask=mask, other=None if mask is None else np.int8(0))
        block = w_ref.at[pl.ds(column, tile.outputs), pl.ds(start, depth)]
        w = plgpu.load(block, mask=weights_mask)
        along_depth = (((1,), (1,)), ((), ()))
        return acc + lax.dot_general(q, w, along_depth, preferred_element_type=jnp.int32)

    return lax.fori_loop(0, plan.depth // depth, add_block, bias)


def _codes_at(plan: _Plan, row: Array):
    """Return a function from a block's depth to the positions of its codes, and a mask or None."""
    geometry, tile, channels = plan.geometry, plan.tile, plan.channels
    height, width = geometry.size
    image, y, x = _pixels(plan, row)
    top = y * geometry.strides[0] - geometry.padding[0][0]
    left = x * geometry.strides[1] - geometry.padding[1][0]
    origin = ((image * height + top) * width + left) * channels
    lane = lax.iota(jnp.int32, tile.block)
    # If a block lies within one tap, the tap is a scalar; otherwise each lane has its own tap.
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
        row_in, column_in = top[:, None] + down, left[:, None] + right
        inside = (row_in >= 0) & (row_in < height) & (column_in >= 0) & (column_in < width)
        return position, jnp.broadcast_to(inside, position.shape)

    return codes_at


def _requantize(plan: _Plan, real: Float32[Array, "m o"], *others: Array) -> Int8[Array, "m o"]:
    """Return codes of sums in units of the output (or the branch), and of the shortcut's codes."""
    zero, residual = plan.zero_out, plan.residual
    if residual is None:
        return (clip_round(real, plan.low - zero, plan.high - zero) + zero).astype(jnp.int8)
    branch_zero = int(residual.branch_zero_point)
    branch = clip_round(real, residual.branch_low - branch_zero, residual.branch_high - branch_zero)
    (other,) = others
    other = other.astype(jnp.int32) - int(residual.zero_point)
    # Exact, with or without fused multiply-adds: the multipliers are dyadic.
    total = branch.astype(jnp.float32) * np.float32(residual.branch_multiplier)
    total = total + other.astype(jnp.float32) * np.float32(residual.multiplier)
    return clip_round(total + np.float32(zero), plan.low, plan.high).astype(jnp.int8)


def _pixels(plan: _Plan, row: Array) -> tuple[Array, Array, Array]:
    """Return image, row and column of a tile's output pixels, clipped to the last pixel."""
    height, width = plan.geometry.output
    pixel = jnp.minimum(row + lax.iota(jnp.int32, plan.tile.rows), plan.rows - 1)
    line = lax.div(pixel, np.int32(width))
    image = lax.div(line, np.int32(height))
    return image, line - image * height, pixel - line * width


def _edge_class(edges: Edges, position: Array) -> Array:
    """Return the number of a position's class (`Edges`)."""
    return jnp.minimum(position, edges.before) + jnp.maximum(position - (edges.after - 1), 0)


def _before_end(start: Array, size: int, end: int) -> Bool[Array, "size"] | None:
    """Return which of `size` positions lie before the end; None if all tiles do."""
    return None if end % size == 0 else start + lax.iota(jnp.int32, size) < end


def _outer_mask(rows: Array | None, columns: Array | None, shape: tuple[int, int]) -> Array | None:
    """Return the mask of a tile from the masks of its rows and columns."""
    if rows is None:
        return None if columns is None else jnp.broadcast_to(columns[None, :], shape)
    mask = rows[:, None] if columns is None else rows[:, None] & columns[None, :]
    return jnp.broadcast_to(mask, shape)


def _check(plan: _Plan, codes: Array, weights: Array, bias: Array) -> None:
    if plan.depth % plan.tile.block:
        raise ExecutionError(
            f"tile.block={plan.tile.block} does not divide the depth, {plan.depth}."
        )
    largest = max(math.prod(codes.shape[:3]) * plan.channels, plan.rows * plan.outputs)
    if largest > LARGEST_TENSOR:
        raise ExecutionError(
            f"a batch of {codes.shape[0]} needs a tensor of {largest} codes; the kernel is limited "
            f"to {LARGEST_TENSOR}: split the batch."
        )
    vertical, horizontal = plan.geometry.edges
    edges = vertical.count * horizontal.count
    expected = {
        "codes": (codes, ((codes.shape[0], *plan.geometry.size, codes.shape[3]),)),
        "weights": (weights, ((plan.outputs, plan.depth),)),
        "bias": (bias, ((1, plan.outputs), (edges, plan.outputs))),
    }
    if plan.residual is not None:
        output = (codes.shape[0], *plan.geometry.output, plan.outputs)
        expected["residual.codes"] = (plan.residual.codes, (output,))
    for name, (array, shapes) in expected.items():
        if array.shape not in shapes:
            raise ExecutionError(
                f"{name}: shape {array.shape}; this convolution needs "
                f"{' or '.join(map(str, shapes))} (`lay_out` returns weights and bias)."
            )
