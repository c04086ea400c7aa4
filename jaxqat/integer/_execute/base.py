"""Execution of an integer graph with plain s8 convolutions and dots.

`Platform` runs on a TPU, whose compiler has native s8 products and fuses the requantization into
them. It is also the base class of the other platforms, which override how codes are stored and how
products are laid out and accumulated. All platforms compute the same integers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxqat.integer import graph as g
from jaxqat.integer._execute.arithmetic import (
    FixedPoint,
    rescale,
    rescale_fixed,
    shift_to_even,
)
from jaxqat.integer._execute.float_ops import evaluate
from jaxqat.integer._execute.geometry import (
    convolve,
    is_depthwise,
    pool_window,
    taken,
    tap_sums,
)
from jaxqat.integer._results import nested
from jaxqat.integer._visitor import GraphVisitor
from jaxqat.quant._forms.exact import scaled
from jaxqat.quant._numerics import windows
from jaxqat.quant._numerics.lookup import look_up
from jaxqat.quant._numerics.promotion import default_promotion

Parameters = dict[str, dict[str, np.ndarray]]


class Platform(GraphVisitor[Array]):
    """Compute every tensor of a graph as stored codes, and the real result if there is one.

    Attributes:
        graph: Network to execute.
        compiler_options: Options for `jax.jit`.
        parameters: Arrays of each product by the node's name, laid out for this platform.
    """

    compiler_options: ClassVar[dict[str, Any] | None] = None

    def __init__(self, graph: g.IntegerGraph):
        super().__init__(graph)
        self.parameters: Parameters = {
            node.name: {**self.prepare(node), **self._multiplier(node)} for node in graph.products()
        }
        # Of the batch that is being visited: its size, and the tensors that are given.
        self._batch: Any = None
        self._entries: dict[str, Array] = {}

    @default_promotion
    def parameters_from(self, arrays: dict[str, dict[str, Array]]) -> Any:
        """Return `parameters`, laid out inside the program from each product's weights and bias.

        So a program for several platforms holds its weights only once.

        Args:
            arrays: 'weights' and 'bias' of each product, by the node's name.
        """
        return {
            node.name: {
                **self.prepare(dataclasses.replace(node, **arrays[node.name])),
                **self._multiplier(node),
            }
            for node in self.graph.products()
        }

    # Platforms override these.

    def offset(self, tensor: g.Tensor) -> int:
        """Return the offset between stored values and codes: stored = code + offset."""
        del tensor
        return 0

    stored_type: ClassVar[Any] = jnp.int8

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Return 'weights' and 'bias' of a product; zero points are folded into the int32 bias."""
        return {"weights": node.weights, "bias": self.folded_bias(node)}

    def accumulate(
        self, node: g.Product, arrays: dict[str, Array], codes: Array
    ) -> Int[Array, "..."]:
        """Return the int32 accumulator of a product, with its bias."""
        if node.kind == "dense":
            return self.dot(codes, arrays["weights"]) + arrays["bias"]
        if is_depthwise(node):
            return self.depthwise(node, codes, arrays["weights"]) + arrays["bias"]
        return convolve(node, codes, arrays["weights"]) + arrays["bias"]

    def batched(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a function of a batch's arrays in the form in which this platform evaluates it."""
        return function

    # All platforms share these.

    def stored_zero(self, name: str) -> int:
        """Return the stored value of the real zero."""
        tensor = self.graph.tensors[name]
        return tensor.zero_point + self.offset(tensor)

    def folded_bias(self, node: g.Product) -> np.ndarray:
        """Return bias - stored_zero * sum(w), int32 (outputs,).

        If `accumulate` pads with 0, taps on padding do not count. The sum then depends on the
        position: (*positions, outputs).
        """
        zero = self.stored_zero(node.inputs[0])
        if zero == 0:
            return node.bias
        if self.pads_with_zero_point(node) or not any(map(any, node.padding)):
            sums = node.weights.astype(np.int32).sum(tuple(range(node.weights.ndim - 1)))
        else:
            sums = tap_sums(node, self.graph.tensors[node.inputs[0]].shape)
        return (node.bias - zero * sums).astype(np.int32)

    def pads_with_zero_point(self, node: g.Product) -> bool:
        """Return whether `accumulate` pads the codes with the zero point and not with 0."""
        return node.kind == "conv" and is_depthwise(node)

    def depthwise(self, node: g.Product, codes: Array, weights: Array) -> Int[Array, "..."]:
        """Return a depthwise convolution (`windows.depthwise`)."""
        return windows.depthwise(self.padded(node, codes), weights, node.strides, node.dilation)

    def padded(self, node: g.Product, codes: Array) -> Array:
        """Pad codes with the zero point."""
        if not any(map(any, node.padding)):
            return codes
        config = [(0, 0, 0), *((low, high, 0) for low, high in node.padding), (0, 0, 0)]
        return lax.pad(codes, np.asarray(self.stored_zero(node.inputs[0]), codes.dtype), config)

    def dot(self, codes: Array, weights: Array) -> Int[Array, "..."]:
        """Return int32 sums over the last axis of the codes."""
        return windows.dot(codes, weights)

    def _multiplier(self, node: g.Product) -> dict[str, np.ndarray]:
        if self.graph.requantization == "float" or node.output not in self.graph.tensors:
            return {"multiplier": node.multiplier}
        fixed = FixedPoint.of(node.multiplier)
        return {"mantissa": fixed.mantissa, "shift": fixed.shift}

    def visit(
        self,
        inputs: Sequence[Array],
        parameters: Mapping[str, Any] | None = None,
        entries: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Return the value of each node, by the name of its output.

        Args:
            inputs: Values of the network's inputs, in their order.
            parameters: Arrays of each product by the node's name.
            entries: Codes of tensors, by name, that their readers see in place of the computed
                ones.
        """
        self._batch = inputs[0].shape[0]
        self._entries = {name: self.stored(name, x) for name, x in (entries or {}).items()}
        return super().visit(inputs, parameters)

    @default_promotion
    def node(
        self,
        node: g.Node,
        values: Mapping[str, Array],
        parameters: Mapping[str, Any],
    ) -> Array:
        """Compute one node in a named scope of the program."""
        seen = {name: self._entries.get(name, values[name]) for name in node.inputs}
        with jax.named_scope(node.name):
            return super().node(node, seen, parameters)

    def quantize(self, node: g.Quantize, x: Array) -> Array:
        """Return the codes of an input: round float32, look up uint8 in the table.

        A NaN gets the code of zero.
        """
        tensor = self.graph.tensors[node.output]
        if x.dtype == jnp.uint8 and node.table is not None:
            table = (node.table.astype(np.int32) + self.offset(tensor)).astype(self.stored_type)
            return look_up(jnp.asarray(table), x.astype(jnp.int32))
        real = x.astype(jnp.float32)
        if node.coefficients:
            real = scaled(real, *node.coefficients.values())
        units = jnp.round(real * node.inverse)
        units = jnp.where(jnp.isnan(units), np.float32(0), units)
        return self.clipped(node.output, units + tensor.zero_point)

    def product(self, node: g.Product, arrays: dict[str, Array], x: Array) -> Array:
        """Return a convolution or a dense layer with its requantization."""
        total = self.accumulate(node, arrays, x)
        if node.output not in self.graph.tensors:
            return total.astype(jnp.float32) * arrays["multiplier"]
        if "mantissa" in arrays:
            units = rescale_fixed(total, arrays["mantissa"], arrays["shift"])
        else:
            units = rescale(total, arrays["multiplier"])
        return self.clipped(node.output, units + self.graph.tensors[node.output].zero_point)

    def rescaled(self, values: Int[Array, "..."], multiplier: np.float32 | np.ndarray) -> Array:
        """Rescale units of one grid to rounded units of another."""
        if self.graph.requantization == "float":
            return rescale(values, jnp.float32(multiplier))
        fixed = FixedPoint.of(multiplier)
        return rescale_fixed(values, jnp.int32(fixed.mantissa), jnp.int32(fixed.shift))

    def add(self, node: g.Add, inputs: list[Array]) -> Array:
        """Add tensors on the output's grid."""
        terms = [self.units(name, codes) for name, codes in zip(node.inputs, inputs, strict=True)]
        zero = self.graph.tensors[node.output].zero_point
        return self.clipped(node.output, self.rounded_sum(node, terms, zero))

    def rounded_sum(self, node: g.Add, terms: list[Array], zero: int) -> Array:
        """Return round(sum(term * factor) / 2**shift + zero) of int32 terms, half to even."""
        if self.graph.requantization == "fixed_point":
            total: Any = zero << node.shift
            for term, factor in zip(terms, node.factors, strict=True):
                total = total + term * factor
            return shift_to_even(total, node.shift)
        total = np.float32(zero)
        for term, multiplier in zip(terms, node.multipliers, strict=True):
            total = total + term.astype(jnp.float32) * multiplier
        return jnp.round(total)

    def multiply(self, node: g.Multiply, inputs: list[Array]) -> Array:
        """Multiply two tensors."""
        left, right = map(self.units, node.inputs, inputs)
        units = self.rescaled(left * right, node.multiplier)
        return self.clipped(node.output, units + self.graph.tensors[node.output].zero_point)

    def mat_mul(self, node: g.MatMul, inputs: list[Array]) -> Array:
        """Multiply two tensors over common axes."""
        left, right = (self.matrices(node, side, x) for side, x in enumerate(inputs))
        total = self.sums_of_pairs(node, left, right)
        free = node.free_sizes([x.shape for x in inputs])
        total = total.reshape(*left.shape[:-2], *free)
        tensor = self.graph.tensors.get(node.output)
        if tensor is None:
            return total.astype(jnp.float32) * node.multiplier
        return self.clipped(node.output, self.rescaled(total, node.multiplier) + tensor.zero_point)

    def matrices(self, node: g.MatMul, side: int, x: Array) -> Array:
        """Return a tensor as matrices: (*batched, rows, columns)."""
        size = node.matrix_size(side, x.shape)
        x = jnp.transpose(x, node.as_matrices(side, x.ndim))
        return x.reshape(*x.shape[: len(node.batched[0])], *size)

    def sums_of_pairs(self, node: g.MatMul, left: Array, right: Array) -> Int[Array, "..."]:
        """Return sum((q_1 - z_1) (q_2 - z_2)) of stored matrices, int32."""
        rank = left.ndim
        common = tuple(range(rank - 2))
        numbers = ((rank - 1,), (rank - 2,)), (common, common)
        total = lax.dot_general(left, right, numbers, preferred_element_type=jnp.int32)
        zeros = [self.stored_zero(name) for name in node.inputs]
        rows = jnp.sum(left.astype(jnp.int32), axis=-1, keepdims=True)
        columns = jnp.sum(right.astype(jnp.int32), axis=-2, keepdims=True)
        return total - zeros[1] * rows - zeros[0] * columns + left.shape[-1] * zeros[0] * zeros[1]

    def affine(self, node: g.Affine, x: Array) -> Array:
        """Apply factors and terms that are numbers of the network."""
        total = self.units(node.inputs[0], x) * node.weights + node.bias
        units = self.rescaled(total, node.multiplier)
        return self.clipped(node.output, units + self.graph.tensors[node.output].zero_point)

    def requantize(self, node: g.Requantize, x: Array) -> Array:
        """Put codes on another grid."""
        units = self.rescaled(self.units(node.inputs[0], x), node.multiplier)
        return self.clipped(node.output, units + self.graph.tensors[node.output].zero_point)

    def table(self, node: g.Table, x: Array) -> Array:
        """Look codes up in a table."""
        index = self.codes(node.inputs[0], x).astype(jnp.int32) - g.CODE_MIN
        return self.stored(node.output, look_up(jnp.asarray(node.table), index))

    def units(self, name: str, stored: Array) -> Int[Array, "..."]:
        """Return the codes of a stored tensor less their zero point, int32."""
        return stored.astype(jnp.int32) - self.stored_zero(name)

    def sum_pool(self, node: g.SumPool, x: Array) -> Array:
        """Average over windows."""
        values = self.units(node.inputs[0], x)
        if node.drop_axes:
            total = jnp.sum(values, axis=tuple(range(1, values.ndim - 1)))
        else:
            total = lax.reduce_window(values, np.int32(0), lax.add, *pool_window(node))
        tensor = self.graph.tensors.get(node.output)
        if tensor is None:
            return total.astype(jnp.float32) * node.multiplier
        return self.clipped(node.output, self.rescaled(total, node.multiplier) + tensor.zero_point)

    def max_pool(self, node: g.MaxPool, x: Array) -> Array:
        """Return the largest code of each window."""
        lowest = np.asarray(jnp.iinfo(x.dtype).min, x.dtype)
        return lax.reduce_window(x, lowest, lax.max, *pool_window(node))

    def move(self, node: g.Move, x: Array) -> Array:
        """Move codes."""
        match node.kind:
            case "reshape":
                return x.reshape(x.shape[0], *node.shape)
            case "transpose":
                return jnp.transpose(x, node.axes)
            case "reverse":
                return lax.rev(x, node.axes)
            case "pad":
                fill = np.asarray(self.stored_zero(node.inputs[0]), x.dtype)
                return lax.pad(x, fill, [(low, high, 0) for low, high in node.padding])
            case "slice":
                return x[(slice(None), *node.slices)]
            case "take":
                return taken(x, node.axis, node.indices)

    def concat(self, node: g.Concat, inputs: list[Array]) -> Array:
        """Concatenate codes, whose storage offset may differ from the output's."""
        codes = [self.codes(name, x) for name, x in zip(node.inputs, inputs, strict=True)]
        return self.stored(node.output, jnp.concatenate(codes, node.axis))

    def float_op(self, node: g.FloatOp, inputs: list[Array]) -> Array:
        """Return an operation on real numbers."""
        real = [self.real(name, x) for name, x in zip(node.inputs, inputs, strict=True)]
        return evaluate(node, real, self._batch)

    def real(self, name: str, values: Array) -> Array:
        """Return real numbers: a tensor of codes dequantized, a real one as it is."""
        tensor = self.graph.tensors.get(name)
        if tensor is None:
            return values
        return self.units(name, values).astype(jnp.float32) * tensor.scale

    def clipped(self, name: str, codes: Array) -> Array:
        """Clip codes to a tensor's bounds and return them as stored."""
        tensor = self.graph.tensors[name]
        return self.stored(name, jnp.clip(codes, tensor.low, tensor.high))

    def stored(self, name: str, codes: Array) -> Array:
        """Return codes as this platform stores them."""
        offset = self.offset(self.graph.tensors[name])
        codes = codes if codes.dtype == jnp.int8 and not offset else codes.astype(jnp.int32)
        return (codes + offset if offset else codes).astype(self.stored_type)

    def codes(self, name: str, stored: Array) -> Int[Array, "..."]:
        """Return the int8 codes of a stored tensor."""
        offset = self.offset(self.graph.tensors[name])
        return (stored.astype(jnp.int32) - offset).astype(jnp.int8)

    @default_promotion
    def result(self, values: dict[str, Array]) -> Any:
        """Return the network's real result: an array, or tuples and dictionaries of arrays."""
        outputs = self.graph.outputs
        return nested(outputs, [self.real(o.name, values[o.name]) for o in outputs])
