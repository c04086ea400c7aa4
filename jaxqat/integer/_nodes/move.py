# pyright: strict
"""Move: operations that move codes without changing them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from jaxqat.integer._nodes.base import Node, Padding, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Move(Node):
    """Move codes without changing them. The batch is axis 0 and stays in place.

    Attributes:
        kind: Operation.
        shape: For 'reshape', the new shape without the batch.
        axes: For 'transpose', the source axis of each axis; for 'reverse', the reversed axes.
        padding: For 'pad', zeros before and after each axis (real zeros: the code zero_point).
        starts: For 'slice', the first index along each axis.
        stops: For 'slice', one past the last index along each axis; -1 for the batch.
        strides: For 'slice', the stride along each axis.
        axis: For 'take', the axis along which elements are picked.
        indices: For 'take', the index of each of them; one can occur several times.
    """

    kind: Literal["reshape", "transpose", "reverse", "pad", "slice", "take"]
    shape: Shape = ()
    axes: Shape = ()
    padding: Padding = ()
    starts: Shape = ()
    stops: Shape = ()
    strides: Shape = ()
    axis: int = 0
    indices: Shape = ()

    @property
    def slices(self) -> tuple[slice, ...]:
        """For 'slice', the slice of each axis after the batch."""
        parts = zip(self.starts[1:], self.stops[1:], self.strides[1:], strict=True)
        return tuple(slice(*part) for part in parts)

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape after the move."""
        (source,) = inputs
        match self.kind:
            case "reshape":
                if math.prod(self.shape) != math.prod(source):
                    raise self.error(f"reshapes {source} to {self.shape}, which has another size.")
                return self.shape
            case "transpose":
                return tuple(source[axis - 1] for axis in self.axes[1:])
            case "reverse":
                return source
            case "pad":
                sizes = zip(source, self.padding[1:], strict=True)
                return tuple(low + size + high for size, (low, high) in sizes)
            case "slice":
                parts = zip(source, self.slices, strict=True)
                return tuple(len(range(*part.indices(size))) for size, part in parts)
            case "take":
                before, after = source[: self.axis - 1], source[self.axis :]
                return (*before, len(self.indices), *after)

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that the output has the zero point and bounds of the input; padding adds zeros."""
        if output is None:
            return
        (source,) = inputs
        self._check_axes(source.shape)
        low, high = source.low, source.high
        if self.kind == "pad":
            low, high = min(low, source.zero_point), max(high, source.zero_point)
        self.check_same_grid(source, output, (low, high))

    def _check_axes(self, shape: Shape) -> None:
        """Check that each list has an entry for each axis, the batch included."""
        rank = 1 + len(shape)
        match self.kind:
            case "transpose":
                ok = sorted(self.axes) == list(range(rank)) and self.axes[:1] == (0,)
            case "reverse":
                ok = len({*self.axes}) == len(self.axes) and {*self.axes} <= {*range(1, rank)}
            case "pad":
                ok = len(self.padding) == rank
            case "slice":
                lengths = {len(part) for part in (self.starts, self.stops, self.strides)}
                ok = lengths == {rank} and min(self.strides) >= 1
            case "take":
                size = shape[self.axis - 1] if 1 <= self.axis < rank else 0
                ok = bool(self.indices) and {*self.indices} <= {*range(size)}
            case _:
                ok = True
        if not ok:
            raise self.error(
                f"{self.kind} of {shape} has axes {self.axes}, padding {self.padding}, starts "
                f"{self.starts}, stops {self.stops}, strides {self.strides}, axis {self.axis} and "
                f"indices {self.indices}."
            )
