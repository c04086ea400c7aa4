"""The integer network as plain data: int8 tensors, and the operations between them.

Every tensor between two operations is int8 on a grid of its own, real = scale * (code -
zero_point), and every operation reads codes and makes codes. The requantizations are those of
Jacob et al. 2018 (arXiv:1712.05877, section 2.2), with batch norm and zero points folded into an
integer bias that is added before the one multiplication,

    code = clip(round((acc + bias) * multiplier) + zero_point, low, high),

where acc + bias is an int32 sum, converted to float32 once, and low and high are the smallest and
the largest code that the output holds: a ReLU is no more than a higher `low`. With `fixed_point`
the product and the rounding are integer as well (`arithmetic`). Arrays are NumPy's; nothing here
computes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from jaxqat.errors import GraphError
from jaxqat.integer._packing import packed_size

Requantization = Literal["float", "fixed_point"]

CODE_MIN, CODE_MAX = -128, 127


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tensor:
    """A tensor of int8 codes.

    Attributes:
        name: Key of its range in the training graph ('stage1/block0/conv1/input'), so that both
            can be compared; tensors that only deployment has are named by what makes them.
        shape: Without the batch, which is the first axis. Channels are the last.
        scale: Real units per code, a positive float32.
        zero_point: Code of the real zero.
        low: Smallest code that it holds: the grid's, or that of a ReLU folded into what makes it.
        high: Largest code that it holds.
    """

    name: str
    shape: tuple[int, ...]
    scale: np.float32
    zero_point: int
    low: int = CODE_MIN
    high: int = CODE_MAX


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """An operation that makes codes.

    Attributes:
        name: Module path of the layer, or a name made from the output's; unique.
        inputs: Names of the tensors it reads.
        output: Name of the tensor it makes.
    """

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """The network's float input becomes codes: clip(round(x * inverse) + zero_point, low, high).

    It has no `inputs`; the graph has one such node.

    Attributes:
        inverse: float32 reciprocal of the output's scale, as training multiplies by it.
        table: Codes of uint8 images, (256, channels): normalization and quantization of every
            value that a pixel can have, computed by the training graph's own program. None if the
            network takes float input only.
    """

    inverse: np.float32
    table: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product(Node):
    """A convolution or a dense layer on codes, with everything up to its output's codes.

        acc = sum((q - zero_point_in) * w)          int32; a border holds real zeros
        code = clip(round((acc + bias) * multiplier) + zero_point_out, low, high)

    Where the output is the network's (`output` names no tensor of the graph), the result is the
    real number (acc + bias) * multiplier.

    Attributes:
        kind: 'conv' or 'dense'.
        weights: int8. Convolution: (*window, inputs / groups, outputs); dense: (inputs, outputs).
            Their sign is such that every multiplier is positive.
        weight_bits: Width of their codes, 2 to 8: -(2**(bits-1)-1) .. 2**(bits-1)-1. In memory a
            code is a byte; saved, codes of up to 4 bits are packed (`packing`).
        bias: int32 (outputs,), in accumulator units.
        multiplier: float32 (outputs,): (scale_in * weight_scale) / scale_out, or
            scale_in * weight_scale for the network's output; each product and quotient rounded to
            float32.
        weight_scale: float32 (outputs,), positive: real units per weight code, batch norm's
            factor included.
        strides: Of a convolution's window, by spatial axis.
        padding: Zeros before and after each spatial axis.
        dilation: Of a convolution's window.
        groups: Of channels.
    """

    kind: Literal["conv", "dense"]
    weights: np.ndarray
    bias: np.ndarray
    multiplier: np.ndarray
    weight_scale: np.ndarray
    weight_bits: int = 8
    strides: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.weights.shape[-1]

    @property
    def window(self) -> tuple[int, ...]:
        """Spatial extent of a convolution's kernel; () for a dense layer."""
        return self.weights.shape[:-2] if self.kind == "conv" else ()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Add(Node):
    """Sum of one or two tensors on the output's grid; with one, a requantization.

        code = clip(sum_i round((q_i - z_i) * multiplier_i) + zero_point_out, low, high)

    Attributes:
        multipliers: float32, scale_i / scale_out for each input. That of the branch of a residual
            addition is an exact power of two.
    """

    multipliers: tuple[np.float32, ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Node):
    """Largest code in each window; a border never wins. The grid stays.

    Attributes:
        window: Extent by spatial axis.
        strides: By spatial axis.
        padding: Before and after each spatial axis.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SumPool(Node):
    """Average pooling: clip(round(sum(q - zero_point_in) * multiplier) + zero_point, low, high).

    Where `output` names no tensor of the graph, the result is the real sum(...) * multiplier.

    Attributes:
        window: Extent by spatial axis; with `drop_axes`, the whole of each.
        strides: By spatial axis.
        padding: Zeros before and after each spatial axis.
        drop_axes: Whether the spatial axes are summed away: (n, h, w, c) to (n, c).
        multiplier: float32.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    drop_axes: bool
    multiplier: np.float32


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Move(Node):
    """Codes moved, not changed; axes count the batch as axis 0, which stays where it is.

    Attributes:
        kind: What is done.
        shape: For 'reshape', the new shape without the batch.
        axes: For 'transpose', the source axis of each axis; for 'reverse', the axes.
        padding: For 'pad', zeros before and after each axis (real zeros: the code zero_point).
        starts: For 'slice', the first index by axis.
        stops: For 'slice', one past the last index by axis; -1 for the batch.
        steps: For 'slice', the step by axis.
    """

    kind: Literal["reshape", "transpose", "reverse", "pad", "slice"]
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    starts: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """Tensors side by side, all of them on the output's grid already.

    Attributes:
        axis: Counting the batch as axis 0.
    """

    axis: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class IntegerGraph:
    """An integer network.

    Invariants, checked when it is made: nodes stand in an order in which each reads what earlier
    ones made; every tensor is made once; what only moves codes keeps their bounds; arrays
    have the stated types and shapes; codes fit int8; scales and multipliers are positive and
    finite; no accumulator can leave int32.

    Attributes:
        input_shape: Of one example, without the batch; the input is float32, and uint8 too if the
            `Quantize` node has a table.
        tensors: By name.
        nodes: In order of execution.
        output: Name of the network's result: a tensor of `tensors` (its real values are the
            result), or the output of the last product or pool, which is real then.
        output_shape: Of one example's result.
        requantization: 'float' (one float32 multiplication and a rounding) or 'fixed_point'
            (int32 multiplier and rounding shift).
        metadata: Free text about it: 'labels' (class names), where it came from.
    """

    input_shape: tuple[int, ...]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]
    output: str
    output_shape: tuple[int, ...]
    requantization: Requantization = "float"
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check(self)

    @property
    def quantize(self) -> Quantize:
        """The node that reads the input."""
        return next(node for node in self.nodes if isinstance(node, Quantize))

    def products(self) -> Iterator[Product]:
        """Convolutions and dense layers, in order."""
        return (node for node in self.nodes if isinstance(node, Product))

    def readers(self, tensor: str) -> list[Node]:
        """The nodes that read a tensor."""
        return [node for node in self.nodes if tensor in node.inputs]

    def size_bytes(self) -> int:
        """Bytes of what the network needs, as saved: packed weights, biases, multipliers."""
        return sum(
            packed_size(p.weights.size, p.weight_bits) + p.bias.nbytes + p.multiplier.nbytes
            for p in self.products()
        )

    def accumulator_bound(self, node: Product) -> int:
        """The largest magnitude that acc + bias of a product can have, whatever the codes."""
        tensor = self.tensors[node.inputs[0]]
        lowest, highest = tensor.low - tensor.zero_point, tensor.high - tensor.zero_point
        lowest, highest = min(lowest, 0), max(highest, 0)  # A border's taps meet real zeros.
        weights = node.weights.astype(np.int64).reshape(-1, node.channels)
        positive, negative = np.maximum(weights, 0).sum(0), np.minimum(weights, 0).sum(0)
        bias = node.bias.astype(np.int64)
        largest = bias + positive * highest + negative * lowest
        smallest = bias + positive * lowest + negative * highest
        return int(np.maximum(np.abs(largest), np.abs(smallest)).max(initial=0))


def _check(graph: IntegerGraph) -> None:
    made: set[str] = set()
    for tensor in graph.tensors.values():
        _check_tensor(tensor)
    for node in graph.nodes:
        where = f"node {node.name!r}"
        missing = [name for name in node.inputs if name not in made]
        if missing:
            raise GraphError(f"{where}: reads {missing[0]!r}, which no node before it makes.")
        if node.output in made:
            raise GraphError(f"{where}: makes {node.output!r}, which is made already.")
        if node.output not in graph.tensors and node.output != graph.output:
            raise GraphError(f"{where}: makes {node.output!r}, which is no tensor of the graph.")
        if isinstance(node, Product):
            _check_product(graph, node, where)
        _check_factors(graph, node, where)
        _check_grids(graph, node, where)
        made.add(node.output)
    unmade = [name for name in (*graph.tensors, graph.output) if name not in made]
    if unmade:
        raise GraphError(f"no node makes {unmade[0]!r}.")
    if sum(isinstance(node, Quantize) for node in graph.nodes) != 1:
        raise GraphError("a graph has one Quantize node.")


def _check_tensor(tensor: Tensor) -> None:
    ordered = CODE_MIN <= tensor.low <= tensor.high <= CODE_MAX
    if not ordered or not CODE_MIN <= tensor.zero_point <= CODE_MAX:
        raise GraphError(
            f"tensor {tensor.name!r}: codes {tensor.low}..{tensor.high} with the zero point "
            f"{tensor.zero_point} do not fit int8."
        )
    if not (np.isfinite(tensor.scale) and tensor.scale > 0):
        raise GraphError(f"tensor {tensor.name!r}: the scale {tensor.scale} is not positive.")


def _check_factors(graph: IntegerGraph, node: Node, where: str) -> None:
    factors: dict[str, tuple[np.float32, ...]] = {}
    if isinstance(node, Quantize):
        factors["inverse"] = (node.inverse,)
        _check_table(graph, node, where)
    elif isinstance(node, Add):
        factors["multipliers"] = node.multipliers
        if len(node.multipliers) != len(node.inputs):
            raise GraphError(
                f"{where}: has {len(node.multipliers)} multipliers for {len(node.inputs)} inputs."
            )
    elif isinstance(node, SumPool):
        factors["multiplier"] = (node.multiplier,)
    for field, values in factors.items():
        if not all(np.isfinite(value) and value > 0 for value in values):
            raise GraphError(f"{where}: {field} is not positive and finite, got {values}.")


def _check_table(graph: IntegerGraph, node: Quantize, where: str) -> None:
    table, shape = node.table, (256, *graph.input_shape[-1:])
    if table is not None and (table.dtype != np.int8 or table.shape != shape):
        raise GraphError(
            f"{where}: table is {table.dtype.name} of shape {table.shape}; right would be int8 "
            f"{shape}, one code for each value of each channel."
        )


def _check_grids(graph: IntegerGraph, node: Node, where: str) -> None:
    if not isinstance(node, MaxPool | Move | Concat) or node.output not in graph.tensors:
        return
    output = graph.tensors[node.output]
    for tensor in (graph.tensors[name] for name in node.inputs):
        low, high = tensor.low, tensor.high
        if isinstance(node, Move) and node.kind == "pad":
            low, high = min(low, tensor.zero_point), max(high, tensor.zero_point)
        # Parts of a whole may be clipped otherwise than the others.
        same = isinstance(node, Concat) or (output.low, output.high) == (low, high)
        if not same or output.zero_point != tensor.zero_point:
            raise GraphError(
                f"{where}: moves codes {low}..{high} with the zero point {tensor.zero_point} from "
                f"{tensor.name!r} to {output.name!r}, which has {output.low}..{output.high} with "
                f"{output.zero_point}; right would be the same."
            )


def _check_product(graph: IntegerGraph, node: Product, where: str) -> None:
    wanted = {"weights": np.int8, "bias": np.int32}
    wanted |= {"multiplier": np.float32, "weight_scale": np.float32}
    for field, dtype in wanted.items():
        array = getattr(node, field)
        if array.dtype != dtype or (field != "weights" and array.shape != (node.channels,)):
            raise GraphError(
                f"{where}: {field} is {array.dtype.name} of shape {array.shape}; right would be "
                f"{np.dtype(dtype).name}" + ("." if field == "weights" else f" ({node.channels},).")
            )
    bits, largest = node.weight_bits, np.abs(node.weights.astype(int)).max(initial=0)
    if bits not in range(2, 9) or largest > 2 ** (bits - 1) - 1:
        raise GraphError(
            f"{where}: weight_bits is {bits!r} and the largest weight code ±{largest}; right would "
            "be 2 to 8 bits, and codes up to ±(2**(bits - 1) - 1)."
        )
    inputs, channels = node.weights.shape[-2] * node.groups, graph.tensors[node.inputs[0]].shape[-1]
    if inputs != channels:
        raise GraphError(
            f"{where}: weights {node.weights.shape} in {node.groups} group(s) take {inputs} "
            f"channels, but {node.inputs[0]!r} has {channels}."
        )
    for field in ("multiplier", "weight_scale"):
        values = getattr(node, field)
        if not (np.isfinite(values) & (values > 0)).all():
            raise GraphError(f"{where}: {field} is not positive and finite everywhere.")
    bound = graph.accumulator_bound(node)
    if bound > np.iinfo(np.int32).max:
        raise GraphError(
            f"{where}: its accumulator can reach {bound}, beyond int32 (sum of |w| times the "
            "largest code, plus the bias)."
        )
