# pyright: strict
"""Base of all node kinds: tensors of codes, and the interface of a node."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from jaxqat.errors import GraphError

CODE_MIN, CODE_MAX = -128, 127

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


def window_shape(
    spatial: Shape, window: Shape, strides: Shape, padding: Padding, dilation: Shape | None = None
) -> Shape:
    """Return the number of positions of a window along each spatial axis."""
    geometry = zip(spatial, window, strides, padding, dilation or (1,) * len(window), strict=True)
    return tuple(
        (size + low + high - spacing * (extent - 1) - 1) // stride + 1
        for size, extent, stride, (low, high), spacing in geometry
    )
