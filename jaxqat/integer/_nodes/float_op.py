# pyright: strict
"""FloatOp: one operation of a float island, in float32 between two integer parts."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from jaxqat.integer._nodes.base import Node, Shape, Tensor

# The operations by name, each with its attributes. The meaning of both is that of `jax.lax`.
OPERATIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                # Of one operand, element by element.
                *("abs", "cbrt", "ceil", "cos", "erf", "erfc", "exp", "exp2", "expm1", "floor"),
                *("is_finite", "log", "log1p", "logistic", "neg", "not", "rsqrt", "sign", "sin"),
                *("sqrt", "square", "tan", "tanh", "round"),
                # Of two operands.
                *("add", "sub", "mul", "div", "max", "min", "pow", "rem", "atan2"),
                *("and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
                # Of three: a mask, the case where it is false, and that where it is true.
                "select",
            ),
            frozenset[str](),
        ),
        "integer_pow": frozenset({"exponent"}),
        "cast": frozenset({"dtype"}),
        **dict.fromkeys(
            ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
            frozenset({"axes"}),
        ),
        **dict.fromkeys(("argmax", "argmin"), frozenset({"axis", "dtype"})),
        **dict.fromkeys(
            ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
            frozenset({"axis", "reverse"}),
        ),
        "reshape": frozenset({"shape"}),
        "broadcast": frozenset({"shape", "axes"}),
        "transpose": frozenset({"axes"}),
        "reverse": frozenset({"axes"}),
        "slice": frozenset({"starts", "stops", "strides"}),
        "pad": frozenset({"padding"}),
        "concatenate": frozenset({"axis"}),
        "iota": frozenset({"shape", "axis", "dtype"}),
        "dot": frozenset({"contracted", "batched", "dtype"}),
        "conv": frozenset(
            {"strides", "padding", "dilation", "input_dilation", "axes", "groups", "dtype"}
        ),
        **dict.fromkeys(
            ("window_max", "window_min", "window_sum"),
            frozenset({"window", "strides", "padding", "dilation", "input_dilation"}),
        ),
        "gather": frozenset(
            {"offset_axes", "collapsed", "start_axes", "batch_axes", "start_batch_axes"}
            | {"sizes", "mode"}
        ),
    }
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FloatOp(Node):
    """One operation on real numbers, computed in float32 (or the type in `dtype`).

    What has no integer form is written down as such operations. A tensor of codes among the inputs
    is dequantized, scale * (code - zero_point). The result is real; a `Quantize` node puts it on a
    grid again. Sizes that depend on the batch are {'batch': k}, k times its size.

    Attributes:
        operation: A key of `OPERATIONS`.
        attributes: Its attributes, plain JSON values.
        constants: One entry for each operand: its value, or None for the next of `inputs`.
        shape: Shape of the result with the batch, wherever that is.
        dtype: Type of the result.
    """

    operation: str
    attributes: dict[str, Any]
    constants: tuple[np.ndarray | None, ...]
    shape: list[Any]
    dtype: str

    may_be_real = True

    def output_shape(self, inputs: Sequence[Shape]) -> Shape:
        """Return the shape of the result without the batch, which must be its first axis.

        The operation itself checks the inputs' shapes, when it runs.
        """
        del inputs
        first, *rest = self.shape or [None]
        if first != {"batch": 1} or not all(type(n) is int for n in rest):
            raise self.error(f"makes the shape {self.shape}, whose first axis is not the batch.")
        return tuple(rest)

    def check(self, inputs: Sequence[Tensor], output: Tensor | None) -> None:
        """Check that the operation is known, has its attributes, and reads its inputs."""
        del inputs
        if output is not None:
            raise self.error(f"makes real numbers, and {self.output!r} is a tensor of codes.")
        known = OPERATIONS.get(self.operation)
        if known is None:
            raise self.error(f"operation {self.operation!r} is not known.")
        if frozenset(self.attributes) != known:
            raise self.error(
                f"{self.operation!r} has the attributes {sorted(known)}, got "
                f"{sorted(self.attributes)}."
            )
        others = sum(value is None for value in self.constants)
        if others != len(self.inputs):
            raise self.error(
                f"has {len(self.inputs)} inputs, and {others} of its operands are no constants."
            )
        if any(value is not None and value.dtype.hasobject for value in self.constants):
            raise self.error("has a constant that is not numeric.")


def at_batch(value: Any, batch: Any) -> Any:
    """Return an attribute or a shape for a batch of this size: {'batch': k} becomes k * batch."""
    if isinstance(value, Mapping):
        return cast("Mapping[str, Any]", value)["batch"] * batch
    if isinstance(value, list):
        return [at_batch(part, batch) for part in cast("list[Any]", value)]
    return value
