"""What all kinds of nodes share: tensors of codes, and the interface of a node."""

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
        name: Key of its range in the training graph ('stage1/block0/conv1/input'), so that the two
            can be compared. Tensors that only deployment has are named by what makes them.
        shape: Without the batch, which is the first axis. Channels are the last.
        scale: Real units per code, a positive float32.
        zero_point: Code of the real zero.
        low: Smallest code that it holds: the grid's, or that of a ReLU folded into what makes it.
        high: Largest code that it holds.
    """

    name: str
    shape: Shape
    scale: np.float32
    zero_point: int
    low: int = CODE_MIN
    high: int = CODE_MAX

    def check(self) -> None:
        """Check that codes fit int8 and that the scale is positive and finite.

        Raises:
            GraphError: Names the tensor and what is wrong with it.
        """
        ordered = CODE_MIN <= self.low <= self.high <= CODE_MAX
        if not ordered or not CODE_MIN <= self.zero_point <= CODE_MAX:
            raise GraphError(
                f"tensor {self.name!r}: codes {self.low}..{self.high} with the zero point "
                f"{self.zero_point} do not fit int8."
            )
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise GraphError(f"tensor {self.name!r}: the scale {self.scale} is not positive.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Node(ABC):
    """An operation that reads codes and makes codes.

    Attributes:
        name: Module path of the layer, or a name made from the output's; unique.
        inputs: Names of the tensors it reads.
        output: Name of the tensor it makes.
        may_be_real: Whether nodes of this kind can end the network with a real result.
    """

    name: str
    inputs: tuple[str, ...]
    output: str

    may_be_real: ClassVar[bool] = False

    @abstractmethod
    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the output, without the batch.

        Args:
            inputs: Shapes of what it reads, without the batch; for `Quantize`, the images.
        """

    @abstractmethod
    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check the invariants of this kind of node.

        Args:
            inputs: The tensors it reads.
            output: The tensor it makes; None for the network's real result.

        Raises:
            GraphError: Names the node, what is wrong, and what would be right.
        """

    def error(self, problem: str) -> GraphError:
        """Return the error that names this node."""
        return GraphError(f"node {self.name!r}: {problem}")

    def check_factors(self, field: str, values: Iterable[np.float32]) -> None:
        """Check that the factors in a field are positive and finite.

        Raises:
            GraphError: Names the node and the field.
        """
        values = tuple(values)
        if not all(np.isfinite(value) and value > 0 for value in values):
            raise self.error(f"{field} is not positive and finite, got {values}.")

    def check_same_grid(
        self, source: Tensor, output: Tensor, bounds: tuple[int, int] | None
    ) -> None:
        """Check that codes keep their zero point, and their bounds where `bounds` says them.

        Raises:
            GraphError: Names the node and both tensors.
        """
        low, high = (source.low, source.high) if bounds is None else bounds
        same = bounds is None or (output.low, output.high) == bounds
        if not same or output.zero_point != source.zero_point:
            raise self.error(
                f"moves codes {low}..{high} with the zero point {source.zero_point} from "
                f"{source.name!r} to {output.name!r}, which has {output.low}..{output.high} with "
                f"{output.zero_point}; right would be the same."
            )


def window_shape(
    spatial: Shape, window: Shape, strides: Shape, padding: Padding, dilation: Shape | None = None
) -> Shape:
    """Return how many positions a window has along each spatial axis."""
    geometry = zip(spatial, window, strides, padding, dilation or (1,) * len(window), strict=True)
    return tuple(
        (size + low + high - apart * (extent - 1) - 1) // stride + 1
        for size, extent, stride, (low, high), apart in geometry
    )
