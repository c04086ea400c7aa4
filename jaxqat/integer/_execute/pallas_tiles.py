"""Geometry, operand layout and tiles of the Pallas convolution.

A convolution of codes (n, h, w, c) with a window (kh, kw) is a product of matrices,

    rows:    n * h2 * w2 output pixels
    depth:   kh * kw * c, tap by tap, the channels of each tap together
    outputs: output channels

The matrix of codes is never built: the kernel computes the positions of the windows. Everything
here is NumPy and Python integers, known before compilation.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32

from jaxqat.errors import ExecutionError

LARGEST_TENSOR = 2**31 - 1  # In codes, whose positions are int32.

# A tensor-core instruction reads 32 int8 along the depth; a block of 64 is four loads of 16 bytes.
_SMALLEST_BLOCK, _BLOCK = 32, 64
# Shared memory of a thread block, in bytes: 99 KiB on the smallest supported architectures (sm_86
# and sm_89; sm_80 has 163, sm_90 has 227), minus a reserve for the compiler.
_SHARED_BYTES = 96 * 1024
# Thread blocks that keep a large GPU busy: an A100 has 108 multiprocessors, an H200 has 132.
_ENOUGH_TILES = 128
# Sums of a thread block of 8 warps, all in registers: 64 per thread, so that two blocks fit on one
# multiprocessor.
_SUMS = 128 * 128

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edges:
    """Classes of output positions along one axis, by the taps that lie inside of the image.

    The windows of the first `before` positions, and of those from `after` on, cross an edge. Each
    of these positions is its own class. All positions between form one class, number `before`. If
    there are none between, `before` counts all positions.

    Attributes:
        before: Number of positions at the start; also the number of the inner class.
        after: First position at the end.
        count: Number of classes.
    """

    before: int
    after: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Geometry of a two-dimensional convolution.

    Attributes:
        size: Height and width of the input.
        window: Height and width of the kernel.
        strides: Stride along each axis.
        padding: Padding before and after each axis; negative padding crops.
        dilation: Dilation along each axis.
    """

    size: Pair
    window: Pair
    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)

    def __post_init__(self):
        if min(self.output) < 1:
            raise ExecutionError(
                f"a window of {self.window} with dilation {self.dilation} does not fit an input of "
                f"{self.size} with padding {self.padding}: the output would be {self.output}."
            )

    @property
    def reach(self) -> Pair:
        """Distance from the first to the last tap, in input positions."""
        return _pair((w - 1) * d for w, d in zip(self.window, self.dilation, strict=True))

    @property
    def output(self) -> Pair:
        """Height and width of the output."""
        axes = zip(self.size, self.padding, self.reach, self.strides, strict=True)
        return _pair((n + sum(pad) - reach - 1) // s + 1 for n, pad, reach, s in axes)

    @property
    def edges(self) -> tuple[Edges, Edges]:
        """Classes of the output rows and of the output columns."""
        vertical, horizontal = (self._edges(axis) for axis in (0, 1))
        return vertical, horizontal

    @property
    def inside(self) -> bool:
        """Whether all taps of all windows lie inside of the image."""
        return all(edges.count == 1 and edges.before == 0 for edges in self.edges)

    def taps_inside(self, axis: int) -> np.ndarray:
        """Return which taps along an axis lie inside of the image, bool (classes, window)."""
        edges = self._edges(axis)
        numbers = np.arange(edges.count)
        position = np.where(
            numbers <= edges.before, numbers, numbers - edges.before + edges.after - 1
        )
        first = position * self.strides[axis] - self.padding[axis][0]
        taps = first[:, None] + np.arange(self.window[axis]) * self.dilation[axis]
        return (taps >= 0) & (taps < self.size[axis])

    def _edges(self, axis: int) -> Edges:
        size, stride, output = self.size[axis], self.strides[axis], self.output[axis]
        start = self.padding[axis][0]
        before = min(max(-(-start // stride), 0), output)
        # First position whose last tap lies beyond the image.
        after = min(max(-(-(size + start - self.reach[axis]) // stride), 0), output)
        if after <= before:
            return Edges(before=output, after=output + 1, count=output)
        return Edges(before=before, after=after, count=before + 1 + output - after)


def padded_channels(channels: int) -> int:
    """Round input channels up to a multiple of four bytes, the kernel's smallest fast load."""
    return -(-channels // 4) * 4


def padded_depth(window: Pair, channels: int) -> int:
    """Return the depth of the laid-out weights, a whole number of blocks."""
    depth = math.prod(window) * padded_channels(channels)
    block = _BLOCK if depth > _SMALLEST_BLOCK else _SMALLEST_BLOCK
    return -(-depth // block) * block


def unsupported_reason(
    shape: tuple[int, ...],
    weights: np.ndarray,
    bias: np.ndarray,
    *,
    strides: tuple[int, ...],
    padding: tuple[Pair, ...],
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
) -> str | None:
    """Return why the kernel cannot compute a convolution; None if it can.

    Args:
        shape: Shape of the codes, (n, h, w, c).
        weights: int8 (*window, c / groups, o).
        bias: int32 (o,).
        strides: Stride along each spatial axis.
        padding: Padding before and after each spatial axis.
        dilation: Dilation along each spatial axis; None means 1.
        groups: Number of channel groups.
    """
    if weights.ndim != 4:
        return f"it has {weights.ndim - 2} spatial axes, not 2"
    if groups != 1:
        return f"it has {groups} groups of channels"
    window, channels, outputs = _pair(weights.shape[:2]), *weights.shape[2:]
    geometry = Geometry(
        size=_pair(shape[1:3]),
        window=window,
        strides=_pair(strides),
        padding=_pair(padding),
        dilation=_pair(dilation or (1, 1)),
    )
    codes_in = math.prod(shape[:3]) * padded_channels(channels)
    codes_out = shape[0] * math.prod(geometry.output) * outputs
    if (codes := max(codes_in, codes_out)) > LARGEST_TENSOR:
        return f"a tensor of {codes} codes has more than {LARGEST_TENSOR}"
    return _overflow_reason(weights, bias)


def lay_out(
    weights: Int8[np.ndarray, "kh kw c o"],
    bias: Int32[np.ndarray, "o"],
    *,
    geometry: Geometry,
    zero_in: int,
) -> tuple[Int8[np.ndarray, "o depth"], Int32[np.ndarray, "edges o"]]:
    """Lay out weights and biases for the kernel, once when a network is built.

    Args:
        weights: Weights of the convolution.
        bias: Bias of the convolution, in accumulator units.
        geometry: Geometry of the convolution.
        zero_in: Zero point of the input.

    Returns:
        The weights by output channel, each padded with zeros to whole blocks; and bias - zero_in *
        sum(weights of the taps inside of the image) for each pair of `Edges` classes (rows,
        columns). If zero_in is 0, the biases have only one row.

    Raises:
        ExecutionError: If a sum can overflow int32.
    """
    if reason := _overflow_reason(weights, bias):
        raise ExecutionError(f"the kernel cannot compute this convolution: {reason}.")
    *window, channels, outputs = weights.shape
    taps = np.zeros((outputs, *window, padded_channels(channels)), np.int8)
    taps[..., :channels] = np.moveaxis(weights, -1, 0)
    taps = taps.reshape(outputs, -1)
    depth = padded_depth(geometry.window, channels)
    matrix = np.pad(taps, ((0, 0), (0, depth - taps.shape[1])))
    if zero_in == 0:
        return matrix, bias[None]
    rows, columns = (geometry.taps_inside(axis).astype(np.int64) for axis in (0, 1))
    sums = np.einsum("ri,cj,ijo->rco", rows, columns, weights.sum(2, dtype=np.int64))
    return matrix, (bias - zero_in * sums.reshape(-1, outputs)).astype(np.int32)


def _overflow_reason(weights: np.ndarray, bias: np.ndarray) -> str | None:
    """Return why a partial sum, with the zero point folded in, can overflow int32, or None.

    Tensor cores saturate, so not even a partial sum may overflow.
    """
    weights = np.abs(weights.astype(np.int64)).sum((0, 1, 2))
    largest = int((np.abs(bias.astype(np.int64)) + 256 * weights).max())
    if largest > np.iinfo(np.int32).max:
        return f"a partial sum can reach {largest}, beyond int32"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The work of one thread block.

    Attributes:
        rows: Output pixels per thread block.
        outputs: Output channels per thread block.
        block: Depth per loop iteration.
        warps: Warps (of 32 threads) per thread block.
        stages: Blocks of the depth that are loaded at the same time.
    """

    rows: int
    outputs: int
    block: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the operands in flight."""
        return self.stages * (self.rows + self.outputs) * self.block


def choose_tile(rows: int, outputs: int, channels: int, depth: int) -> Tile:
    """Choose a tile for a shape by a model, not by measurement.

    For rows * outputs products a tile reads rows + outputs codes from the L2 cache, whose bandwidth
    limits int8 first. So the tile has the most products per code read, among those that give enough
    tiles to keep a large GPU busy.

    Args:
        rows: Output pixels of the whole batch.
        outputs: Number of output channels.
        channels: Number of input channels as laid out.
        depth: Depth as laid out.
    """

    def tiles(area: Pair) -> int:
        return -(-rows // area[0]) * -(-outputs // area[1])

    areas = _areas(outputs)
    most_tiles = max(areas, key=lambda area: (tiles(area), -math.prod(area)))
    area = next((area for area in areas if tiles(area) >= _ENOUGH_TILES), most_tiles)
    block = 2 * _BLOCK if channels % (2 * _BLOCK) == 0 else min(_BLOCK, depth)
    stages = min(4, depth // block, _SHARED_BYTES // (sum(area) * block))
    sums = math.prod(area)
    warps = 8 if sums >= _SUMS else 4 if sums >= 32 * 32 else 2
    return Tile(rows=area[0], outputs=area[1], block=block, warps=warps, stages=stages)


def _areas(outputs: int) -> list[Pair]:
    """Return (rows, outputs) of tiles, ordered from the most products per code read."""
    widest = max(16, 1 << (outputs - 1).bit_length())
    areas = itertools.product((256, 128, 64, 32, 16), repeat=2)
    areas = [(m, n) for m, n in areas if n <= widest and m * n <= _SUMS]
    return sorted(areas, key=_reuse, reverse=True)


def _reuse(area: Pair) -> float:
    """Return the products per code that a tile reads."""
    return math.prod(area) / sum(area)


def _pair(values: Iterable) -> tuple[Any, Any]:
    first, second = values
    return first, second
