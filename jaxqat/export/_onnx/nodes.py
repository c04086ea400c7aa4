"""The operations of an integer graph in ONNX's quantized form.

Each tensor is uint8: the output of a QuantizeLinear, read through a DequantizeLinear. Between the
two is a float operation, and runtimes fuse all three into an integer kernel. The fused kernels
compute the graph's arithmetic to the bit (`grids` explains how). A runtime without fusion computes
the same real numbers, up to float rounding.

Bounds narrower than uint8 are clipped on the codes, after QuantizeLinear: a float Clip or Relu
before it would keep ONNX Runtime from using an integer kernel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._onnx import moves as onnx_moves
from jaxqat.export._onnx import tables
from jaxqat.export._onnx.builder import Builder, channels_first, channels_last, output_name
from jaxqat.export._onnx.float_ops import FloatOpWriter
from jaxqat.export._onnx.grids import UINT8_MAX, offsets, pool_scale, sum_scales, weight_scales
from jaxqat.export._onnx.products import affine, geometry, mat_mul, oriented_weights, scaled
from jaxqat.integer._visitor import GraphVisitor
from jaxqat.integer.graph import (
    Add,
    Affine,
    Concat,
    FloatOp,
    IntegerGraph,
    MatMul,
    MaxPool,
    Move,
    Multiply,
    Node,
    Product,
    Quantize,
    Requantize,
    SumPool,
    Table,
    Tensor,
)

_ONE = np.float32(1)
BATCH = {"batch": 1}
FLOAT = 1  # ONNX's element type.


class OnnxWriter(GraphVisitor[str]):
    """Write each node in ONNX's quantized form; values are names of ONNX tensors.

    An ONNX tensor holds uint8 codes, channels first, or real numbers, in JAX's layout.

    Attributes:
        builder: The ONNX graph so far.
        inputs: Name in ONNX of each of the network's inputs.
        offsets: For each tensor, its uint8 codes minus its int8 codes.
        codes: For each tensor, the name of the ONNX tensor of its uint8 codes.
        entries: Name in ONNX of each tensor that is an input of the file, if `by_segment`.
        results: Name in ONNX of each of the network's outputs.
    """

    def __init__(
        self,
        graph: IntegerGraph,
        names: Sequence[str],
        *,
        uint8: bool,
        opset: int,
        by_segment: bool = False,
    ):
        """Start to write.

        Args:
            graph: The network.
            names: Names of its inputs, in their order.
            uint8: Whether the input is uint8 images, looked up in the table.
            opset: Version of ONNX's operators.
            by_segment: Whether the tensors that float islands make are inputs of the file, so that
                each integer part is computed by itself.
        """
        super().__init__(graph)
        self.builder = Builder()
        self.entries: dict[str, str] = {}
        self._by_segment = by_segment
        self.inputs = [self.builder.name(name) for name in names]
        self._float_ops = FloatOpWriter(self.builder, self.inputs[0], opset)
        given = graph.inputs
        self._shapes: dict[str, list[Any]] = {i.name: [BATCH, *i.shape] for i in given}
        self._types: dict[str, str] = {each.name: each.type for each in given}
        self._types |= {node.output: node.dtype for node in graph.float_ops}
        self.offsets = offsets(graph)
        self.codes: dict[str, str] = {}
        self._real: dict[tuple[str, float], str] = {}
        self._uint8 = uint8
        self.results = [self.builder.name(output_name(output)) for output in graph.outputs]

    def write(self) -> None:
        """Write all nodes, and give the network's real results their names."""
        values = self.visit(self.inputs)
        real = [self._in_jax(output.name, values) for output in self.graph.outputs]
        self.builder.rename_all(real, self.results)

    def _in_jax(self, name: str, values: Mapping[str, str]) -> str:
        """Return real numbers in JAX's layout; a tensor of codes is dequantized."""
        tensor = self.graph.tensors.get(name)
        if tensor is None:
            return values[name]
        real, axes = self.real(name, tensor.scale), channels_last(1 + len(tensor.shape))
        return self.builder.transpose(real, axes, f"{name}/channels_last")

    def node(
        self,
        node: Node,
        values: Mapping[str, str],
        parameters: Mapping[str, Any],
    ) -> str:
        """Write one node, and store the name of its output's codes."""
        output = super().node(node, values, parameters)
        tensor = self.graph.tensors.get(node.output)
        if tensor is not None:
            self.codes[node.output] = output
            self._shapes[node.output] = [BATCH, *tensor.shape]
        elif isinstance(node, FloatOp):
            self._shapes[node.output] = node.shape
        else:
            shapes = [self.graph.tensors[name].shape for name in node.inputs]
            self._shapes[node.output] = [BATCH, *node.output_shape(shapes)]
        return output

    def float_op(self, node: FloatOp, inputs: list[str]) -> str:
        """Write an operation on real numbers, in JAX's layout."""
        values = dict(zip(node.inputs, inputs, strict=True))
        real = [self._in_jax(name, values) for name in node.inputs]
        return self._float_ops.write(node, real, [self._shapes[name] for name in node.inputs])

    def real(self, name: str, scale: np.float32) -> str:
        """Return the output of a DequantizeLinear of a tensor with this scale, writing it once."""
        key = (name, float(scale))
        if key not in self._real:
            zero = self._zero(self.graph.tensors[name])
            scale_name = self.builder.constant(np.float32(scale), f"{name}/scale")
            inputs = [self.codes[name], scale_name, zero]
            self._real[key] = self.builder.add("DequantizeLinear", inputs, f"{name}/real")
        return self._real[key]

    def _zero(self, tensor: Tensor) -> str:
        zero = np.uint8(tensor.zero_point + self.offsets[tensor.name])
        return self.builder.constant(zero, f"{tensor.name}/zero_point")

    def _quantized(self, real: str, tensor: Tensor, scale: np.float32 | None = None) -> str:
        """Write a QuantizeLinear to a tensor's grid, and a Clip if its bounds are not uint8's."""
        scale = tensor.scale if scale is None else scale
        scale_name = self.builder.constant(np.float32(scale), f"{tensor.name}/scale")
        inputs = [real, scale_name, self._zero(tensor)]
        low, high = self._bounds(tensor)
        exact = low == 0 and high == UINT8_MAX
        name = f"{tensor.name}/{'codes' if exact else 'unbounded'}"
        return self._clipped(self.builder.add("QuantizeLinear", inputs, name), tensor)

    def _bounds(self, tensor: Tensor) -> tuple[int, int]:
        offset = self.offsets[tensor.name]
        return tensor.low + offset, tensor.high + offset

    def _clipped(self, codes: str, tensor: Tensor, low: int = 0, high: int = UINT8_MAX) -> str:
        """Clip codes in low..high to the bounds of a tensor, if they can exceed them."""
        bottom, top = self._bounds(tensor)
        if low >= bottom and high <= top:
            return codes
        inputs = [codes, "", ""]
        if low < bottom:
            inputs[1] = self.builder.constant(np.uint8(bottom), f"{tensor.name}/low")
        if high > top:
            inputs[2] = self.builder.constant(np.uint8(top), f"{tensor.name}/high")
        inputs = inputs if inputs[2] else inputs[:2]
        return self.builder.add("Clip", inputs, f"{tensor.name}/codes")

    def quantize(self, node: Quantize, x: str) -> str:
        """Write the codes of real numbers: a rounding, or a lookup of pixels in the table."""
        out = self.graph.tensors[node.output]
        builder, rank = self.builder, 1 + len(out.shape)
        if self._by_segment and out.name in self.graph.entries:
            self.entries[out.name] = builder.name(f"{out.name}/entry")
            # A copy, because the codes are an output too.
            return builder.add("Identity", [self.entries[out.name]], f"{out.name}/codes")
        if self._uint8 and self.graph.quantizes_input(node):
            codes = tables.of_pixels(builder, node, x, self.offsets[out.name])
        else:
            if self._types.get(node.inputs[0], "float32") != "float32":
                x = builder.add("Cast", [x], f"{out.name}/numbers", to=FLOAT)
            # The float32 product of training first, then the rounding as a separate node.
            inverse = builder.constant(np.float32(node.inverse), "inverse")
            units = builder.add("Mul", [scaled(builder, node, x), inverse], f"{out.name}/scaled")
            codes = self._quantized(self._without_nan(units, out.name), out, _ONE)
        return builder.transpose(codes, channels_first(rank), f"{out.name}/channels_first")

    def _without_nan(self, real: str, name: str) -> str:
        """Replace NaN by 0: QuantizeLinear leaves its code open, and runtimes choose the lowest."""
        builder = self.builder
        is_nan = builder.add("IsNaN", [real], f"{name}/is_nan")
        nothing = builder.constant(np.float32(0), "nothing")
        return builder.add("Where", [is_nan, nothing, real], f"{name}/numbers")

    def product(self, node: Product, arrays: Any, x: str) -> str:
        """Write a Conv or a Gemm, with codes or the network's real result as output."""
        out = self.graph.tensors.get(node.output)
        if out is not None:
            return self._quantized(self._real_product(node, out), out)
        rank = 1 + len(self.graph.tensors[node.inputs[0]].shape)
        if rank == 2:
            return self._real_product(node, None)
        sums = self._integer_sums(node)
        return self.builder.transpose(sums, channels_last(rank), "channels_last")

    def _real_product(self, node: Product, out: Tensor | None) -> str:
        source = self.graph.tensors[node.inputs[0]]
        scales = weight_scales(node, source.scale, out)
        if scales is None:
            raise ExportError(
                f"node {node.name!r}: its multipliers must be float32 quotients of float32 scales, "
                "(scale_in * weight_scale) / scale_out, which ONNX needs."
            )
        spatial = len(source.shape) - 1
        weights = oriented_weights(node.weights, node.kind, spatial)
        inputs = [
            self.real(source.name, source.scale),
            self._weights(node, weights, scales, axis=0 if spatial else 1),
            self._bias(node, (source.scale * scales).astype(np.float32)),
        ]
        name = f"{node.name}/product"
        if spatial == 0:
            return self.builder.add("Gemm", inputs, name)
        return self.builder.add("Conv", inputs, name, **geometry(node, spatial))

    def _weights(self, node: Product, weights: np.ndarray, scales: np.ndarray, axis: int) -> str:
        builder = self.builder
        inputs = [
            builder.constant(weights, f"{node.name}/weights"),
            builder.constant(scales, f"{node.name}/weight_scale"),
            builder.constant(np.zeros(len(scales), np.int8), f"{node.name}/weight_zero_point"),
        ]
        return builder.add("DequantizeLinear", inputs, f"{node.name}/real_weights", axis=axis)

    def _bias(self, node: Product, scales: np.ndarray) -> str:
        builder = self.builder
        inputs = [
            builder.constant(node.bias, f"{node.name}/bias"),
            builder.constant(scales, f"{node.name}/bias_scale"),
            builder.constant(np.zeros(len(scales), np.int32), f"{node.name}/bias_zero_point"),
        ]
        return builder.add("DequantizeLinear", inputs, f"{node.name}/real_bias", axis=0)

    def mat_mul(self, node: MatMul, inputs: list[str]) -> str:
        """Write a MatMulInteger of the codes, whose result is int32, and its requantization."""
        shapes = [self.graph.tensors[name].shape for name in node.inputs]
        zeros = [self._zero(self.graph.tensors[name]) for name in node.inputs]
        builder = self.builder
        total = mat_mul(builder, node, "MatMulInteger", inputs, shapes, zeros)
        total = builder.add("Cast", [total], f"{node.name}/float_sum", to=FLOAT)
        multiplier = builder.constant(node.multiplier, f"{node.name}/multiplier")
        real = builder.add("Mul", [total, multiplier], f"{node.name}/real")
        out = self.graph.tensors.get(node.output)
        if out is None:
            return real
        codes, axes = self._quantized(real, out, _ONE), channels_first(1 + len(out.shape))
        return builder.transpose(codes, axes, f"{out.name}/channels_first")

    def add(self, node: Add, inputs: list[str]) -> str:
        """Write an Add of dequantized terms, which runtimes replace by a QLinearAdd."""
        out = self.graph.tensors[node.output]
        scales = sum_scales(node, out.scale)
        terms = [self.real(name, s) for name, s in zip(node.inputs, scales.terms, strict=True)]
        total = self.builder.add("Add", terms, f"{node.name}/sum")
        return self._quantized(total, out, scales.out)

    def multiply(self, node: Multiply, inputs: list[str]) -> str:
        """Write a Mul of codes less their zero points, which float32 holds, and its rounding.

        A QLinearMul, which runtimes would make of it with the tensors' own scales, rounds twice.
        """
        units = self.builder.add(
            "Mul", [self.real(name, _ONE) for name in node.inputs], f"{node.name}/units"
        )
        multiplier = self.builder.constant(node.multiplier, f"{node.name}/multiplier")
        real = self.builder.add("Mul", [units, multiplier], f"{node.name}/real")
        return self._quantized(real, self.graph.tensors[node.output], _ONE)

    def affine(self, node: Affine, x: str) -> str:
        """Write the int32 sums of codes and constants, and their requantization."""
        source = self.graph.tensors[node.inputs[0]]
        real = affine(self.builder, node, x, source.zero_point + self.offsets[source.name])
        return self._quantized(real, self.graph.tensors[node.output], _ONE)

    def requantize(self, node: Requantize, x: str) -> str:
        """Write a DequantizeLinear in units of the other grid, and its rounding."""
        units = self.real(node.inputs[0], node.multiplier)
        return self._quantized(units, self.graph.tensors[node.output], _ONE)

    def table(self, node: Table, x: str) -> str:
        """Write the lookup of codes in a table."""
        offsets = self.offsets[node.inputs[0]], self.offsets[node.output]
        rank = 1 + len(self.graph.tensors[node.output].shape)
        return tables.of_codes(self.builder, node, x, offsets, rank)

    def max_pool(self, node: MaxPool, x: str) -> str:
        """Write a MaxPool of codes."""
        return self._moved(node, onnx_moves.max_pool(self.builder, node, x))

    def move(self, node: Move, x: str) -> str:
        """Write a move of codes."""
        source = self.graph.tensors[node.inputs[0]]
        zero = np.uint8(source.zero_point + self.offsets[source.name])
        rank = 1 + len(source.shape)
        return self._moved(node, onnx_moves.move(self.builder, node, x, rank, zero))

    def concat(self, node: Concat, inputs: list[str]) -> str:
        """Write a Concat of codes."""
        rank = 1 + len(self.graph.tensors[node.output].shape)
        return self._moved(node, onnx_moves.concat(self.builder, node, inputs, rank))

    def _moved(self, node: Node, codes: str) -> str:
        """Clip moved codes to the bounds of the output."""
        return self._clipped(codes, self.graph.tensors[node.output], *self._all_bounds(node))

    def _all_bounds(self, node: Node) -> tuple[int, int]:
        """Return the smallest and the largest code of the inputs, including padding."""
        sources = [self.graph.tensors[name] for name in node.inputs]
        bounds = [self._bounds(source) for source in sources]
        if isinstance(node, Move) and node.kind == "pad":
            zero = sources[0].zero_point + self.offsets[sources[0].name]
            bounds.append((zero, zero))
        return min(low for low, _ in bounds), max(high for _, high in bounds)

    def sum_pool(self, node: SumPool, x: str) -> str:
        """Write an average pool: over windows, as a convolution with ones."""
        out = self.graph.tensors.get(node.output)
        if not node.drop_axes:
            return self.product(self._as_depthwise(node), None, x)
        if out is None:
            return self._real_sum(node)
        area = int(np.prod(node.window))
        scale = pool_scale(node.multiplier, area, out)
        if scale is not None:
            real = self.real(node.inputs[0], scale)
            mean = self.builder.add("GlobalAveragePool", [real], f"{node.name}/mean")
            codes = self._quantized(mean, out)
            return self.builder.add("Flatten", [codes], f"{out.name}/flat")
        return self._quantized(self._real_sum(node), out, _ONE)

    def _as_depthwise(self, node: SumPool) -> Product:
        """Return a pool as a convolution with ones, whose integer kernel sums before it rounds."""
        channels = self.graph.tensors[node.inputs[0]].shape[-1]
        multiplier = np.full(channels, node.multiplier, np.float32)
        scale = self.graph.tensors[node.inputs[0]].scale
        return Product(
            name=node.name,
            inputs=node.inputs,
            output=node.output,
            kind="conv",
            weights=np.ones((*node.window, 1, channels), np.int8),
            bias=np.zeros(channels, np.int32),
            multiplier=multiplier,
            weight_scale=(multiplier / scale).astype(np.float32),
            strides=node.strides,
            padding=node.padding,
            groups=channels,
        )

    def _real_sum(self, node: SumPool) -> str:
        """Write sum(q - z) * multiplier over all spatial axes, as a float sum of integers."""
        units = self.real(node.inputs[0], _ONE)
        axes = list(range(2, 2 + len(node.window)))
        axes_name = self.builder.constant(np.array(axes, np.int64), f"{node.name}/axes")
        total = self.builder.add("ReduceSum", [units, axes_name], f"{node.name}/sum", keepdims=0)
        multiplier = self.builder.constant(node.multiplier, f"{node.name}/multiplier")
        return self.builder.add("Mul", [total, multiplier], f"{node.name}/real")

    def _integer_sums(self, node: Product) -> str:
        """Write (acc + bias) * multiplier with ConvInteger.

        Runtimes have no integer kernel for a Conv with a float result, and a float kernel rounds.
        """
        builder, source = self.builder, self.graph.tensors[node.inputs[0]]
        spatial = len(source.shape) - 1
        weights = oriented_weights(node.weights, node.kind, spatial)
        weights = builder.constant(weights, f"{node.name}/weights")
        inputs = [self.codes[source.name], weights, self._zero(source)]
        attributes = geometry(node, spatial)
        total = builder.add("ConvInteger", inputs, f"{node.name}/products", **attributes)
        by_channel = (-1, *(1,) * spatial)
        bias = builder.constant(node.bias.reshape(by_channel), f"{node.name}/bias")
        total = builder.add("Add", [total, bias], f"{node.name}/sum")
        total = builder.add("Cast", [total], f"{node.name}/float_sum", to=FLOAT)
        multiplier = node.multiplier.reshape(by_channel)
        multiplier = builder.constant(multiplier, f"{node.name}/multiplier")
        return builder.add("Mul", [total, multiplier], f"{node.name}/real")
