# pyright: strict
"""Base of all node kinds: tensors of codes, and the interface of a node."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from jaxqat.errors import GraphError

CODE_MIN, CODE_MAX = -128, 127
MAX_ELEMENTS = 2**31
"""No tensor of one example has as many elements; nor has one with its padding."""

Shape = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tensor:
    """A tensor of int8 codes: real = scale * (code - zero_point).

    Attributes:
        name: Key of its range in the training graph ('stage1/block0/conv1/input'), so that both
            can be compared. A tensor without a range there is named after its node.
        shape: Shape without the batch, which is the first axis. Channels are the last.
        scale: Real units per code, a positive float32.
        zero_point: Code of the real zero.
        low: Smallest code of the tensor: that of its grid, raised by a fused ReLU.
        high: Largest code of the tensor.
    """

    name: str
    shape: Shape
    scale: np.float32
    zero_point: int
    low: int = CODE_MIN
    high: int = CODE_MAX

    def check(self) -> None:
        """Check that the codes fit int8 and that the scale is positive and finite.

        Raises:
            GraphError: If they do not; names the tensor and the problem.
        """
        check_shape(f"tensor {self.name!r}", self.shape)
        ordered = CODE_MIN <= self.low <= self.high <= CODE_MAX
        if not ordered or not CODE_MIN <= self.zero_point <= CODE_MAX:
            raise GraphError(
                f"tensor {self.name!r}: codes {self.low}..{self.high} with zero point "
                f"{self.zero_point} do not fit int8."
            )
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise GraphError(
                f"tensor {self.name!r}: the scale must be positive and finite, got {self.scale}."
            )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Node(ABC):
    """An operation on codes.

    Attributes:
        name: Module path of the layer, or a name derived from the output's; unique.
        inputs: Names of the input tensors.
        output: Name of the output tensor.
        may_be_real: Whether a node of this kind can return the network's result as real numbers.
    """

    name: str
    inputs: tuple[str, ...]
    output: str

    may_be_real: ClassVar[bool] = False

    @abstractmethod
    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the output, without the batch.

        Args:
            inputs: Shapes of the inputs, without the batch; for `Quantize`, that of the images.
        """

    @abstractmethod
    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check the invariants of this kind of node.

        Args:
            inputs: The input tensors.
            output: The output tensor; None for the network's real result.

        Raises:
            GraphError: If one is broken; names the node, the problem and the fix.
        """

    def error(self, problem: str) -> GraphError:
        """Return an error that names this node."""
        return GraphError(f"node {self.name!r}: {problem}")

    def check_factors(self, field: str, values: Iterable[np.float32]) -> None:
        """Check that the factors in a field are positive and finite.

        Raises:
            GraphError: If they are not; names the node and the field.
        """
        values = tuple(values)
        if not all(np.isfinite(value) and value > 0 for value in values):
            raise self.error(f"{field} is not positive and finite, got {values}.")

    def check_broadcast(self, field: str, array: "np.ndarray", shape: Shape) -> None:
        """Check that an array has a tensor's axes, each of the tensor's size or of size 1.

        Raises:
            GraphError: If it does not; names the node, the field and both shapes.
        """
        sizes = zip(array.shape, shape, strict=False)
        if array.ndim != len(shape) or any(n not in (1, size) for n, size in sizes):
            raise self.error(
                f"{field} has the shape {array.shape}; it needs the axes of the tensor, {shape}, "
                "each of that size or 1."
            )

    def check_window(self, source: Tensor, *, dilation: Shape | None = None) -> None:
        """Check the geometry of a window: one entry per spatial axis, of a possible size.

        Args:
            source: The tensor that the window moves over.
            dilation: Dilation along each spatial axis; None for 1.

        Raises:
            GraphError: If a list has another length, a size is not positive, or the padded tensor
                is too large; names the node.
        """
        window, strides, padding = (getattr(self, k) for k in ("window", "strides", "padding"))
        spacing = (1,) * len(window) if dilation is None else dilation
        spatial, channels = source.shape[:-1], source.shape[-1:]
        lengths = {len(part) for part in (window, strides, padding, spacing)}
        if lengths != {len(spatial)} or not channels:
            raise self.error(
                f"needs window, strides, padding and dilation of {len(spatial)} axes, got {window},"
                f" {strides}, {padding} and {spacing}."
            )
        if min((*window, *strides, *spacing), default=1) < 1:
            raise self.error(
                f"window {window}, strides {strides} and dilation {spacing} must be positive."
            )
        padded = (low + size + high for size, (low, high) in zip(spatial, padding, strict=True))
        check_shape(f"node {self.name!r}: input with padding", (*padded, *channels))

    def check_same_grid(
        self, source: Tensor, output: Tensor, bounds: tuple[int, int] | None
    ) -> None:
        """Check that the output has the source's zero point and, unless None, these bounds.

        Raises:
            GraphError: If it does not; names the node and both tensors.
        """
        low, high = (source.low, source.high) if bounds is None else bounds
        same = bounds is None or (output.low, output.high) == bounds
        if not same or output.zero_point != source.zero_point:
            raise self.error(
                f"moves codes {low}..{high} with zero point {source.zero_point} from "
                f"{source.name!r} to {output.name!r}, which has codes {output.low}..{output.high} "
                f"with zero point {output.zero_point}; they must be the same."
            )


def check_shape(what: str, shape: Shape) -> None:
    """Check that the sizes in a shape are positive, and that no more elements are in it than fit.

    Raises:
        GraphError: If not; begins with `what`.
    """
    if min(shape, default=1) < 1 or math.prod(shape) >= MAX_ELEMENTS:
        raise GraphError(
            f"{what}: sizes must be positive, with fewer than 2**31 elements, got {shape}."
        )


def window_shape(
    spatial: Shape, window: Shape, strides: Shape, padding: Padding, dilation: Shape | None = None
) -> Shape:
    """Return the number of positions of a window along each spatial axis."""
    geometry = zip(spatial, window, strides, padding, dilation or (1,) * len(window), strict=True)
    return tuple(
        (size + low + high - spacing * (extent - 1) - 1) // stride + 1
        for size, extent, stride, (low, high), spacing in geometry
    )
