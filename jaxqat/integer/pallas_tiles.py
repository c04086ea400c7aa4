"""Shapes of the Pallas convolution: where its windows lie, how its product is cut into tiles.

A convolution of codes (n, h, w, c) with a window (kh, kw) is a product of matrices,

    rows:    n * h2 * w2 output pixels        outputs: output channels
    depth:   kh * kw * c, the channels of one tap after those of another

of which no operand is ever made: the kernel finds each window by arithmetic. Every figure here is
a Python integer, known before anything is compiled.
"""

import dataclasses
import itertools
import math

import numpy as np

# A block of the depth is at least what one tensor-core instruction takes (32 int8), and a block of
# 64 is a load of four times 16 bytes by row.
SMALLEST_BLOCK, BLOCK = 32, 64

# What a thread block may hold in shared memory, in bytes: 99 KiB on the smallest of the supported
# architectures (sm_86 and sm_89; sm_80 has 163, sm_90 227), less what the compiler needs itself.
_SHARED_BYTES = 96 * 1024
# Thread blocks that keep a large GPU busy: an A100 has 108 multiprocessors, an H200 has 132.
_ENOUGH_PROGRAMS = 128
_AREAS = ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 32), (16, 16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edges:
    """Along one axis, the output positions whose window lies partly outside of the image.

    The first `before` positions and those from `after` on are such, and each is a class of its
    own; all positions between them are one class, number `before`, whose window lies inside.

    Attributes:
        before: Positions at the start.
        after: First position of the end; at most `before` says that there are none between.
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

    size: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self):
        if min(self.output) < 1:
            raise ValueError(
                f"a window of {self.window} with dilation {self.dilation} does not fit an input of "
                f"{self.size} with padding {self.padding}: the output would be {self.output}."
            )

    @property
    def reach(self) -> tuple[int, int]:
        """Input positions between the first and the last tap."""
        return _pair((w - 1) * d for w, d in zip(self.window, self.dilation, strict=True))

    @property
    def output(self) -> tuple[int, int]:
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
        if after <= before:  # Every position is cut: each is a class, numbered by itself.
            return Edges(before=output, after=output + 1, count=output)
        return Edges(before=before, after=after, count=before + 1 + output - after)


def padded_channels(channels: int) -> int:
    """Input channels as the kernel wants them: four bytes are its smallest fast load."""
    return -(-channels // 4) * 4


def padded_depth(window: tuple[int, int], channels: int) -> int:
    """Depth of the weights as laid out, a whole number of blocks."""
    depth = math.prod(window) * padded_channels(channels)
    block = BLOCK if depth > SMALLEST_BLOCK else SMALLEST_BLOCK
    return -(-depth // block) * block


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
    """The tile for a shape: the largest of which there are enough to keep a large GPU busy.

    Large tiles read each operand less often; a tile of 128 x 128 with 8 warps leaves 64 registers
    a thread for the sums. Not tuned on hardware: `candidates` lists what to try.

    Args:
        rows: Output pixels of the whole batch.
        outputs: Output channels.
        channels: Input channels as laid out.
        depth: Depth as laid out.
    """
    widest = max(16, 1 << (outputs - 1).bit_length())
    areas = [(m, n) for m, n in _AREAS if n <= widest]

    def programs(area: tuple[int, int]) -> int:
        return -(-rows // area[0]) * -(-outputs // area[1])

    busy = (area for area in areas if programs(area) >= _ENOUGH_PROGRAMS)
    return _tile(next(busy, max(areas, key=programs)), channels, depth)


def candidates(rows: int, outputs: int, channels: int, depth: int) -> tuple[Tile, ...]:
    """Tiles worth timing for a shape, the chosen one first; the arguments are `choose_tile`'s."""
    chosen = choose_tile(rows, outputs, channels, depth)
    areas = (*_AREAS, (256, 64), (256, 128), (128, 256))
    found = [chosen]
    for (m, n), warps, stages in itertools.product(areas, (4, 8), (2, 3, 4, 5)):
        tile = dataclasses.replace(chosen, rows=m, outputs=n, warps=warps, stages=stages)
        sums = m * n // (32 * warps)  # Registers a thread for the sums, of 255.
        fits = tile.shared_bytes <= _SHARED_BYTES and 4 <= sums <= 128
        if fits and m < 2 * rows and n < 2 * outputs and tile != chosen:
            found.append(tile)
    return tuple(found)


def _tile(area: tuple[int, int], channels: int, depth: int) -> Tile:
    rows, outputs = area
    block = 2 * BLOCK if channels % (2 * BLOCK) == 0 else min(BLOCK, depth)
    stages = min(4, depth // block, _SHARED_BYTES // ((rows + outputs) * block))
    warps = 8 if rows * outputs >= 128 * 128 else 4
    return Tile(rows=rows, outputs=outputs, block=block, warps=warps, stages=stages)


def _pair(values) -> tuple[int, int]:
    first, second = values
    return first, second
