# pyright: strict
"""MatMul: the product of two tensors over common axes, as in attention."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MatMul(Node):
    """Product of two tensors of codes: sums over some axes, for each index of others.

        acc = sum((q_1 - z_1) (q_2 - z_2))     int32
        code = clip(round(acc * multiplier) + zero_point_out, low, high)

    The axes of the result are the batched ones, then the others of the first tensor, then those of
    the second, as `jax.lax.dot_general` has them. If `output` names no tensor of the graph, it is
    real, acc * multiplier.

    Attributes:
        contracted: For each tensor, the axes that are summed over, in the order of their pairs.
        batched: For each tensor, the axes that both have; the batch, axis 0, is the first.
        multiplier: float32: (scale_1 * scale_2) / scale_out, or scale_1 * scale_2 for a real
            result.
    """

    contracted: tuple[Shape, Shape]
    batched: tuple[Shape, Shape]
    multiplier: np.float32

    may_be_real: ClassVar[bool] = True

    def free(self, side: int, rank: int) -> Shape:
        """Return the axes of a tensor (0 or 1) that it alone has.

        Args:
            side: Which tensor.
            rank: Its rank, the batch included.
        """
        common = (*self.contracted[side], *self.batched[side])
        return tuple(axis for axis in range(rank) if axis not in common)

    def as_matrices(self, side: int, rank: int) -> Shape:
        """Return the axes of a tensor as those of matrices: batched, then rows, then columns."""
        inner = (self.free(side, rank), self.contracted[side])
        return (*self.batched[side], *inner[side], *inner[1 - side])

    def matrix_size(self, side: int, shape: Shape) -> tuple[int, int]:
        """Return the numbers of rows and columns of a tensor's matrices.

        Args:
            side: Which tensor.
            shape: Its shape, the batch included.
        """
        free = math.prod(shape[axis] for axis in self.free(side, len(shape)))
        inner = math.prod(shape[axis] for axis in self.contracted[side])
        return (free, inner) if side == 0 else (inner, free)

    def free_sizes(self, shapes: Sequence[Shape]) -> Shape:
        """Return the sizes of the result's axes behind the batched ones; the batch is included."""
        return tuple(shape[a] for i, shape in enumerate(shapes) for a in self.free(i, len(shape)))

    def macs(self, inputs: Sequence[Shape]) -> int:
        """Return the multiply-accumulate operations for one example."""
        inner = math.prod(inputs[0][axis - 1] for axis in self.contracted[0])
        return inner * math.prod(self.output_shape(inputs))

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the sizes of batched and free axes; those of common axes must be equal."""
        self._check_axes(inputs)
        shapes = [(-1, *shape) for shape in inputs]  # The batch's size is not known.
        for kind, axes in (("sums over", self.contracted), ("has in common", self.batched)):
            left, right = ([s[a] for a in part] for s, part in zip(shapes, axes, strict=True))
            if left != right:
                raise self.error(f"{kind} axes of the sizes {left} and {right}, which differ.")
        return (*(shapes[0][axis] for axis in self.batched[0][1:]), *self.free_sizes(shapes))

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that there are two tensors, and that no sum can overflow int32."""
        del output
        if len(inputs) != 2:
            raise self.error(f"has {len(inputs)} inputs; it multiplies two.")
        self._check_axes([tensor.shape for tensor in inputs])
        self.check_factors("multiplier", [self.multiplier])
        count = math.prod(inputs[0].shape[axis - 1] for axis in self.contracted[0])
        bound = count * math.prod(map(_largest, inputs))
        if bound > np.iinfo(np.int32).max:
            raise self.error(f"its accumulator can reach {bound}, beyond int32.")

    def _check_axes(self, inputs: Sequence[Shape]) -> None:
        pairs = zip(inputs, self.contracted, self.batched, strict=True)
        for shape, contracted, batched in pairs:
            axes = (*contracted, *batched)
            if len({*axes}) < len(axes) or not {*axes} <= {*range(len(shape) + 1)}:
                raise self.error(
                    f"sums over the axes {self.contracted} and has {self.batched} in common, which "
                    f"are not axes of {shape} with the batch before it."
                )
        lengths = [{len(axes) for axes in part} for part in (self.contracted, self.batched)]
        if any(len(each) != 1 for each in lengths):
            raise self.error(
                f"sums over the axes {self.contracted} and has {self.batched} in common, which are "
                "not as many for both tensors."
            )
        if any(axes[:1] != (0,) for axes in self.batched):
            raise self.error(f"has the axes {self.batched} in common, of which 0 is not the first.")


def _largest(tensor: Tensor) -> int:
    """Return the largest magnitude of a code less the zero point."""
    return max(abs(tensor.low - tensor.zero_point), abs(tensor.high - tensor.zero_point))
