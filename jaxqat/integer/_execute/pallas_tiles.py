"""What the Pallas convolution knows before it runs: geometry, layout of its operands, tiles.

A convolution of codes (n, h, w, c) with a window (kh, kw) is a product of matrices,

    rows:    n * h2 * w2 output pixels
    depth:   kh * kw * c, the channels of one tap after those of another
    outputs: output channels

of which that of the codes is never made: the kernel finds the windows by arithmetic. All of this
is NumPy and Python integers, known before anything is compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32

LARGEST_TENSOR = 2**31 - 1  # Codes: positions are int32.

# A tensor-core instruction takes 32 int8 of the depth; a block of 64 is four loads of 16 bytes.
_SMALLEST_BLOCK, _BLOCK = 32, 64
# What a thread block may hold in shared memory, in bytes: 99 KiB on the smallest of the supported
# architectures (sm_86 and sm_89; sm_80 has 163, sm_90 has 227), less what the compiler may need.
_SHARED_BYTES = 96 * 1024
# Thread blocks that keep a large GPU busy: an A100 has 108 multiprocessors, an H200 has 132.
_ENOUGH_TILES = 128
# The sums of a thread block, all in registers: 64 a thread with the 8 warps that then two blocks
# can have on one multiprocessor, or 128, which leave room for one block.
_SUMS, _MOST_SUMS = 128 * 128, 128 * 256

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edges:
    """Along one axis, the output positions whose window lies partly outside of the image.

    The first `before` positions and those from `after` on are such, and each is a class of its
    own; the positions between them are one class, number `before`. Where there are none between,
    all positions count as those before.

    Attributes:
        before: Positions at the start; also the number of the class whose windows lie inside.
        after: First position of the end.
        count: Classes.
    """

    before: int
    after: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where the windows of a two-dimensional convolution lie.

    Attributes:
        size: Height and width of the input.
        window: Height and width of the kernel.
        strides: By axis.
        padding: Before and after each axis; negative crops.
        dilation: By axis.
    """

    size: Pair
    window: Pair
    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)

    def __post_init__(self):
        if min(self.output) < 1:
            raise ValueError(
                f"a window of {self.window} with dilation {self.dilation} does not fit an input of "
                f"{self.size} with padding {self.padding}: the output would be {self.output}."
            )

    @property
    def reach(self) -> Pair:
        """Input positions between the first and the last tap."""
        return _pair((w - 1) * d for w, d in zip(self.window, self.dilation, strict=True))

    @property
    def output(self) -> Pair:
        """Height and width of the output."""
        axes = zip(self.size, self.padding, self.reach, self.strides, strict=True)
        return _pair((n + sum(pad) - reach - 1) // s + 1 for n, pad, reach, s in axes)

    @property
    def edges(self) -> tuple[Edges, Edges]:
        """The classes of rows and of columns."""
        vertical, horizontal = (self._edges(axis) for axis in (0, 1))
        return vertical, horizontal

    @property
    def inside(self) -> bool:
        """Whether no tap ever meets the border."""
        return all(edges.count == 1 and edges.before == 0 for edges in self.edges)

    def taps_inside(self, axis: int) -> np.ndarray:
        """Which taps of an axis meet the image, bool (classes, window)."""
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
        # The first position whose last tap is beyond the image.
        after = min(max(-(-(size + start - self.reach[axis]) // stride), 0), output)
        if after <= before:
            return Edges(before=output, after=output + 1, count=output)
        return Edges(before=before, after=after, count=before + 1 + output - after)


def padded_channels(channels: int) -> int:
    """Input channels as the kernel wants them: four bytes are its smallest fast load."""
    return -(-channels // 4) * 4


def padded_depth(window: Pair, channels: int) -> int:
    """Depth of the weights as laid out, a whole number of blocks."""
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
    """Why the kernel cannot compute a convolution; None if it can.

    Args:
        shape: Of the codes, (n, h, w, c).
        weights: int8 (*window, c / groups, o).
        bias: int32 (o,).
        strides: By spatial axis.
        padding: Before and after each spatial axis.
        dilation: By spatial axis; None is 1.
        groups: Of channels.
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
    """The weights and biases that the kernel reads, made once when a network is built.

    Args:
        weights: Of the convolution.
        bias: Of the convolution, in accumulator units.
        geometry: Of the convolution.
        zero_in: Zero point of the input.

    Returns:
        The weights, one output channel after the other, each padded with zeros to whole blocks;
        and bias - zero_in * sum(weights of the taps that meet the image), by the edges that a
        window crosses, or in one row if no window crosses any or the zero point is 0.

    Raises:
        ValueError: If a sum can leave int32.
    """
    if reason := _overflow_reason(weights, bias):
        raise ValueError(f"the kernel cannot compute this convolution: {reason}.")
    *window, channels, outputs = weights.shape
    taps = np.zeros((outputs, *window, padded_channels(channels)), np.int8)
    taps[..., :channels] = np.moveaxis(weights, -1, 0)
    taps = taps.reshape(outputs, -1)
    depth = padded_depth(geometry.window, channels)
    matrix = np.pad(taps, ((0, 0), (0, depth - taps.shape[1])))
    if zero_in == 0:
        return matrix, bias[None]
    rows, columns = (geometry.taps_inside(axis).astype(np.int64) for axis in (0, 1))
    met = np.einsum("ri,cj,ijo->rco", rows, columns, weights.sum(2, dtype=np.int64))
    return matrix, (bias - zero_in * met.reshape(-1, outputs)).astype(np.int32)


def _overflow_reason(weights: np.ndarray, bias: np.ndarray) -> str | None:
    """Tensor cores saturate, so no partial sum may leave int32, a folded zero point included."""
    weights = np.abs(weights.astype(np.int64)).sum((0, 1, 2))
    largest = int((np.abs(bias.astype(np.int64)) + 256 * weights).max())
    if largest > np.iinfo(np.int32).max:
        return f"a partial sum can reach {largest}, beyond int32"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How one thread block works.

    Attributes:
        rows: Output pixels of a thread block.
        outputs: Output channels of a thread block.
        block: Depth that it takes at a time.
        warps: Warps of 32 threads.
        stages: Blocks of the depth on their way at the same time.
    """

    rows: int
    outputs: int
    block: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the operands on their way take."""
        return self.stages * (self.rows + self.outputs) * self.block


def choose_tile(rows: int, outputs: int, channels: int, depth: int) -> Tile:
    """The tile for a shape, reasoned, not measured: `candidates` lists what to time on a GPU.

    A tile reads rows + outputs codes for every rows * outputs products, all of them from the second
    level of cache, whose bandwidth is what limits int8 first. So it is the one that does the most
    with what it reads, of those of which there are enough to keep a large GPU busy.

    Args:
        rows: Output pixels of the whole batch.
        outputs: Output channels.
        channels: Input channels as laid out.
        depth: Depth as laid out.
    """

    def tiles(area: Pair) -> int:
        return -(-rows // area[0]) * -(-outputs // area[1])

    areas = _areas(outputs, _SUMS)
    most = max(areas, key=lambda area: (tiles(area), -math.prod(area)))
    area = next((area for area in areas if tiles(area) >= _ENOUGH_TILES), most)
    block = 2 * _BLOCK if channels % (2 * _BLOCK) == 0 else min(_BLOCK, depth)
    stages = min(4, depth // block, _SHARED_BYTES // (sum(area) * block))
    sums = math.prod(area)
    warps = 8 if sums >= _SUMS else 4 if sums >= 32 * 32 else 2
    return Tile(rows=area[0], outputs=area[1], block=block, warps=warps, stages=stages)


def candidates(
    rows: int, outputs: int, channels: int, depth: int, *, shared_bytes: int = _SHARED_BYTES
) -> tuple[Tile, ...]:
    """Tiles worth timing for a shape, the chosen one first.

    Args:
        rows: As `choose_tile`'s, like the next three.
        outputs: Output channels.
        channels: Input channels as laid out.
        depth: Depth as laid out.
        shared_bytes: What the GPU at hand grants a thread block; an H200 227 KiB.
    """
    chosen = choose_tile(rows, outputs, channels, depth)
    reuse = _reuse((chosen.rows, chosen.outputs))
    areas = [(m, n) for m, n in _areas(outputs, _MOST_SUMS) if m < 2 * max(rows, 16)]
    areas = [area for area in areas if reuse / 2 <= _reuse(area) <= reuse * 2]
    blocks = [block for block in (64, 128) if depth % block == 0] or [depth]
    found = [chosen]
    for (m, n), block, warps in itertools.product(areas, blocks, (2, 4, 8)):
        most = min(5, depth // block)
        for stages in range(min(2, most), 1 + most):
            tile = Tile(rows=m, outputs=n, block=block, warps=warps, stages=stages)
            sums = m * n // (32 * warps)
            fits = tile.shared_bytes <= shared_bytes and 16 <= sums <= 128
            if fits and tile != chosen:
                found.append(tile)
    return tuple(found)


def _areas(outputs: int, most_sums: int) -> list[Pair]:
    """Rows and outputs of tiles, those first that do the most with what they read."""
    widest = max(16, 1 << (outputs - 1).bit_length())
    areas = itertools.product((256, 128, 64, 32, 16), repeat=2)
    areas = [(m, n) for m, n in areas if n <= widest and m * n <= most_sums]
    return sorted(areas, key=_reuse, reverse=True)


def _reuse(area: Pair) -> float:
    """Products for each code that a tile reads."""
    return math.prod(area) / sum(area)


def _pair(values: Iterable) -> tuple[Any, Any]:
    first, second = values
    return first, second
