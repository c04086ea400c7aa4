"""The float network of an integer graph, in JAX and in PyTorch: the baselines of the benchmark.

`FloatVisitor` defines that network; this module has the operations of both libraries.
"""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqat.bench.checks import BenchmarkError
from jaxqat.integer import graph as g
from jaxqat.integer._execute.float_ops import evaluate
from jaxqat.integer._float_visitor import FloatVisitor
from jaxqat.integer._results import nested

Arrays = dict[str, tuple[Any, Any]]
"""Weights and bias of each product, by node."""

# Names of `jax.default_matmul_precision`; without one, "float32" would be TF32 or bfloat16.
_PRECISIONS = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "default"}


class FloatNetwork(FloatVisitor[Any]):
    """Computes a graph in float on arrays with channels last."""

    def all_folded(self) -> Arrays:
        """Return the float32 weights and bias of each product, by node."""
        return {node.name: self.folded(node) for node in self.graph.products()}

    def run(self, arrays: Arrays, images: Any) -> Any:
        """Return the network's result."""
        values, outputs = self.visit([images], arrays), self.graph.outputs
        return nested(outputs, [values[output.name] for output in outputs])

    def quantize(self, node: g.Quantize, x: Any) -> Any:
        """Return the numbers without rounding, with the model's factors and terms."""
        if not node.coefficients:
            return x
        arrays = (self.constant(array[None]) for array in node.coefficients.values())
        shifts, factors, terms = arrays
        return (x + shifts) * factors + terms

    def add(self, node: g.Add, inputs: list[Any]) -> Any:
        """Return the sum of two tensors."""
        return inputs[0] + inputs[1]

    def affine(self, node: g.Affine, x: Any) -> Any:
        """Return a tensor with the network's own factors and terms."""
        factors, terms = map(self.constant, self.affine_numbers(node))
        return x * factors + terms

    def multiply(self, node: g.Multiply, inputs: list[Any]) -> Any:
        """Return the product of two tensors."""
        return inputs[0] * inputs[1]

    def mat_mul(self, node: g.MatMul, inputs: list[Any]) -> Any:
        """Return the product of two tensors over common axes."""
        shapes = [tuple(x.shape) for x in inputs]
        matrices = []
        for side, (x, shape) in enumerate(zip(inputs, shapes, strict=True)):
            x = self.permute(x, node.as_matrices(side, len(shape)))
            common = tuple(x.shape)[: len(node.batched[0])]
            matrices.append(x.reshape(*common, *node.matrix_size(side, shape)))
        left, right = matrices
        return (left @ right).reshape(*tuple(left.shape)[:-2], *node.free_sizes(shapes))

    def table(self, node: g.Table, x: Any) -> Any:
        """Refuse: a table has no function of real numbers."""
        raise BenchmarkError(f"node {node.name!r}: a table of codes has no float form to measure.")

    def sum_pool(self, node: g.SumPool, x: Any) -> Any:
        """Return averages of windows, or of all pixels."""
        return self.window_sums(node, x) * self.pool_factor(node)

    def move(self, node: g.Move, x: Any) -> Any:
        """Return the same values at other positions."""
        match node.kind:
            case "reshape":
                return x.reshape(x.shape[0], *node.shape)
            case "transpose":
                return self.permute(x, node.axes)
            case "reverse":
                return self.flip(x, node.axes)
            case "pad":
                return self.pad(x, node.padding)
            case "slice":
                return x[(slice(None), *node.slices)]
            case "take":
                return x[(slice(None),) * node.axis + (list(node.indices),)]

    @abstractmethod
    def constant(self, array: np.ndarray) -> Any:
        """Return an array as a tensor of the network's precision."""

    @abstractmethod
    def window_sums(self, node: g.SumPool, x: Any) -> Any:
        """Return sums of windows, or of all pixels."""

    @abstractmethod
    def pad(self, x: Any, padding: tuple[tuple[int, int], ...]) -> Any:
        """Add zeros before and after each axis."""

    @abstractmethod
    def permute(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Put the axes in another order."""

    @abstractmethod
    def flip(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Reverse axes."""


class JaxNetwork(FloatNetwork):
    """The float network in JAX.

    Attributes:
        precision: 'fp32', 'tf32' or 'bf16'.
        outputs_first: Whether a convolution's weights are (outputs, *window, inputs), the layout of
            cuDNN. Without it, cuDNN needs a transposition at every call.
    """

    def __init__(self, graph: g.IntegerGraph, precision: str, *, outputs_first: bool = False):
        super().__init__(graph)
        self.precision, self.outputs_first = precision, outputs_first
        self.dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
        self._batch: Any = None

    def arrays(self) -> Arrays:
        """Return weights and biases on the device, in the network's precision and layout."""
        folded = self.all_folded()
        if self.outputs_first:
            for node in self.graph.products():
                weights, bias = folded[node.name]
                if node.kind == "conv":
                    folded[node.name] = np.moveaxis(weights, -1, 0), bias
        return jax.tree.map(lambda a: jnp.asarray(a, self.dtype), folded)

    def constant(self, array: np.ndarray) -> Any:
        """Return an array of the program."""
        return jnp.asarray(array, self.dtype)

    def apply(self, arrays: Arrays, images: jax.Array) -> jax.Array:
        """Return the float32 logits of float32 images."""
        self._batch = images.shape[0]
        with jax.default_matmul_precision(_PRECISIONS[self.precision]):
            return self.run(arrays, images.astype(self.dtype)).astype(jnp.float32)

    def product(self, node: g.Product, arrays: Any, x: Any) -> Any:
        """Compute a convolution or a dense layer."""
        weights, bias = arrays
        if node.kind == "dense":
            return x.astype(self.dtype) @ weights + bias
        spatial = "DHW"[3 - len(node.window) :]
        kernel = f"O{spatial}I" if self.outputs_first else f"{spatial}IO"
        total = lax.conv_general_dilated(
            x,
            weights,
            node.strides,
            node.padding,
            rhs_dilation=node.dilation,
            dimension_numbers=(f"N{spatial}C", kernel, f"N{spatial}C"),
            feature_group_count=node.groups,
        )
        return total + bias

    def window_sums(self, node: g.SumPool, x: Any) -> Any:
        """Return sums of windows, or of all pixels, computed in float32 for any precision."""
        x = x.astype(jnp.float32)
        if node.drop_axes:
            return x.sum(tuple(range(1, x.ndim - 1)))
        return lax.reduce_window(x, 0.0, lax.add, *_window(node)).astype(self.dtype)

    def max_pool(self, node: g.MaxPool, x: Any) -> Any:
        """Return maxima of windows."""
        lowest = np.asarray(-np.inf, x.dtype)
        return lax.reduce_window(x, lowest, lax.max, *_window(node))

    def concat(self, node: g.Concat, inputs: list[Any]) -> Any:
        """Concatenate tensors."""
        return jnp.concatenate(inputs, node.axis)

    def float_op(self, node: g.FloatOp, inputs: list[Any]) -> Any:
        """Return the same operation, in float32."""
        real = [x.astype(jnp.float32) if x.dtype == self.dtype else x for x in inputs]
        return evaluate(node, real, self._batch)

    def pad(self, x: Any, padding: tuple[tuple[int, int], ...]) -> Any:
        """Add zeros before and after each axis."""
        return jnp.pad(x, padding)

    def permute(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Put the axes in another order."""
        return jnp.transpose(x, axes)

    def flip(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Reverse axes."""
        return jnp.flip(x, axes)

    def bound(self, node: g.Node, x: Any, low: float | None, high: float | None) -> Any:
        """Clip values to bounds."""
        return jnp.clip(x, low, high)


class TorchNetwork(FloatNetwork):
    """The float network in PyTorch; for its channels-last kernels, tensors are views of NHWC."""

    def __init__(self, graph: g.IntegerGraph, torch: Any):
        super().__init__(graph)
        self.torch, self.nn = torch, torch.nn.functional

    def arrays(self) -> Arrays:
        """Return weights and biases in PyTorch's layout."""
        return {
            node.name: tuple(map(self._tensor, (_outputs_first(node, weights), bias)))
            for node, (weights, bias) in zip(
                self.graph.products(), self.all_folded().values(), strict=True
            )
        }  # pyright: ignore[reportReturnType]

    def constant(self, array: np.ndarray) -> Any:
        """Return an array as a tensor."""
        return self.torch.from_numpy(np.ascontiguousarray(array))

    def _tensor(self, array: np.ndarray) -> Any:
        tensor = self.torch.from_numpy(np.ascontiguousarray(array))
        form = {4: self.torch.channels_last, 5: self.torch.channels_last_3d}.get(tensor.ndim)
        return tensor if form is None else tensor.contiguous(memory_format=form)

    def product(self, node: g.Product, arrays: Any, x: Any) -> Any:
        """Compute a convolution or a dense layer."""
        weights, bias = arrays
        if node.kind == "dense":
            return self.nn.linear(x, weights, bias)
        sides, padding = node.padding, tuple(low for low, _ in node.padding)
        if any(low != high for low, high in sides):
            x, padding = self.pad(x, ((0, 0), *sides, (0, 0))), 0
        convolve = getattr(self.nn, f"conv{len(node.window)}d")
        x = _channels_first(x)
        y = convolve(x, weights, bias, node.strides, padding, node.dilation, node.groups)
        return _channels_last(y)

    def window_sums(self, node: g.SumPool, x: Any) -> Any:
        """Return sums of windows, or of all pixels."""
        if node.drop_axes:
            return x.sum(tuple(range(1, x.ndim - 1)))
        x = self.pad(x, ((0, 0), *node.padding, (0, 0)))
        average = getattr(self.nn, f"avg_pool{len(node.window)}d")
        averages = average(_channels_first(x), node.window, node.strides)
        return _channels_last(averages) * float(np.prod(node.window))

    def max_pool(self, node: g.MaxPool, x: Any) -> Any:
        """Return maxima of windows."""
        x = self._pad(x, ((0, 0), *node.padding, (0, 0)), -np.inf)
        pool = getattr(self.nn, f"max_pool{len(node.window)}d")
        return _channels_last(pool(_channels_first(x), node.window, node.strides))

    def concat(self, node: g.Concat, inputs: list[Any]) -> Any:
        """Concatenate tensors."""
        return self.torch.cat(inputs, node.axis)

    def float_op(self, node: g.FloatOp, inputs: list[Any]) -> Any:
        """Refuse: only JAX runs float islands."""
        raise BenchmarkError(f"node {node.name!r}: PyTorch is not measured with float islands.")

    def pad(self, x: Any, padding: tuple[tuple[int, int], ...]) -> Any:
        """Add zeros before and after each axis."""
        return self._pad(x, padding, 0.0)

    def _pad(self, x: Any, padding: tuple[tuple[int, int], ...], value: float) -> Any:
        if not any(map(any, padding)):
            return x
        return self.nn.pad(x, [n for pair in reversed(padding) for n in pair], value=value)

    def permute(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Put the axes in another order."""
        return x.permute(axes)

    def flip(self, x: Any, axes: tuple[int, ...]) -> Any:
        """Reverse axes."""
        return x.flip(axes)

    def bound(self, node: g.Node, x: Any, low: float | None, high: float | None) -> Any:
        """Clip values to bounds."""
        return self.nn.relu(x) if low == 0 and high is None else x.clamp(low, high)


def _channels_first(x: Any) -> Any:
    """Return a view with channels first."""
    return x.movedim(-1, 1)


def _channels_last(x: Any) -> Any:
    """Return a view with channels last."""
    return x.movedim(1, -1)


def _outputs_first(node: g.Product, weights: np.ndarray) -> np.ndarray:
    """Return (*window, inputs, outputs) as (outputs, inputs, *window)."""
    return np.moveaxis(weights, (-1, -2), (0, 1))


def _window(node: g.SumPool | g.MaxPool) -> tuple[Any, ...]:
    padding = ((0, 0), *node.padding, (0, 0))
    return (1, *node.window, 1), (1, *node.strides, 1), padding
