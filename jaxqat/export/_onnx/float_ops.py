"""Float operations as standard ONNX operators, in JAX's layout.

ONNX Runtime computes them in float32 like JAX, and rounds some in another order, so codes behind a
float island can differ by one.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._onnx.builder import Builder, channels_first, channels_last
from jaxqat.integer._nodes.float_op import FloatOp

_BEFORE_FIRST = np.iinfo(np.int64).min + 1  # End of a slice with a negative stride.
_AXES_ARE_INPUT = 18  # From this opset on, of all reductions; before, of ReduceSum only.
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Operations that one operator of ONNX computes.
_DIRECT = MappingProxyType(
    {
        **{"abs": "Abs", "ceil": "Ceil", "cos": "Cos", "erf": "Erf", "exp": "Exp"},
        **{"floor": "Floor", "log": "Log", "logistic": "Sigmoid", "neg": "Neg", "not": "Not"},
        **{"round": "Round", "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "tan": "Tan"},
        **{"tanh": "Tanh", "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max"},
        **{"min": "Min", "pow": "Pow", "and": "And", "or": "Or", "xor": "Xor", "eq": "Equal"},
        **{"lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
    }
)


class FloatOpWriter:
    """Writes float operations.

    Args:
        builder: The ONNX graph.
        image: Name of an input of the network, whose first axis is the batch.
        opset: Version of ONNX's operators.
    """

    def __init__(self, builder: Builder, image: str, opset: int):
        self._builder, self._image, self._opset = builder, image, opset
        self._batch: str | None = None

    def write(self, node: FloatOp, inputs: list[str], shapes: list[list[Any]]) -> str:
        """Write an operation; return the name of its result.

        Args:
            node: The operation.
            inputs: Names of its inputs.
            shapes: Their shapes, with {'batch': k} for sizes that depend on the batch.

        Raises:
            ExportError: ONNX has no operators for it.
        """
        for dtype in (node.dtype, *(str(c.dtype) for c in node.constants if c is not None)):
            if dtype == "bfloat16":
                raise _error(node, "it computes in bfloat16")
        names, sizes = iter(inputs), iter(shapes)
        operands: list[str] = []
        dims: list[list[Any]] = []
        for i, value in enumerate(node.constants):
            constant = value is not None
            operands.append(
                self._builder.constant(value, f"{node.name}/constant{i}")
                if constant
                else next(names)
            )
            dims.append(list(value.shape) if constant else next(sizes))
        if node.operation in _DIRECT:
            return self._add(node, _DIRECT[node.operation], operands)
        writer = _WRITERS.get(node.operation)
        if writer is None:
            raise _error(node, "ONNX has no operator for it")
        return writer(self, node, operands, dims)

    def _add(self, node: FloatOp, kind: str, inputs: list[str], **attributes: Any) -> str:
        return self._builder.add(kind, inputs, node.output, **attributes)

    def _part(self, node: FloatOp, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Write a part of an operation."""
        return self._builder.add(kind, inputs, f"{node.name}/{kind.lower()}", **attributes)

    def _numbers(self, values: list[int], name: str) -> str:
        return self._builder.constant(np.array(values, np.int64), name)

    def _number(self, value: float) -> str:
        return self._builder.constant(np.float32(value), "number")

    def _shape(self, shape: list[Any], name: str) -> str:
        """Return the name of a shape, as a tensor."""
        if all(type(n) is int for n in shape):
            return self._numbers(shape, name)
        parts = [
            self._numbers([n], f"{name}/size") if type(n) is int else self._times(n["batch"])
            for n in shape
        ]
        return self._builder.add("Concat", parts, name, axis=0)

    def _times(self, factor: int) -> str:
        """Return the name of the batch's size times a number, as a tensor of one element."""
        builder = self._builder
        if self._batch is None:
            whole = builder.add("Shape", [self._image], "input/shape")
            self._batch = builder.add("Gather", [whole, self._numbers([0], "first")], "batch")
        if factor == 1:
            return self._batch
        return builder.add("Mul", [self._batch, self._numbers([factor], "factor")], "batches")

    def reshape(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a reshape; one size that depends on the batch follows from the others."""
        shape = node.attributes["shape"]
        if sum(type(n) is not int for n in shape) == 1 and 0 not in shape:
            known = [n if type(n) is int else -1 for n in shape]
            return self._add(node, "Reshape", [operands[0], self._numbers(known, "shape")])
        return self._add(node, "Reshape", [operands[0], self._shape(shape, f"{node.name}/shape")])

    def broadcast(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a broadcast: axes of size 1 where there are none, then an Expand."""
        shape, axes = node.attributes["shape"], node.attributes["axes"]
        missing = [axis for axis in range(len(shape)) if axis not in axes]
        x = operands[0]
        if missing:
            x = self._part(node, "Unsqueeze", [x, self._numbers(missing, "axes")])
        return self._add(node, "Expand", [x, self._shape(shape, f"{node.name}/shape")])

    def transpose(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a transposition."""
        return self._add(node, "Transpose", operands, perm=node.attributes["axes"])

    def slice(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a slice; axes that stay whole are left out."""
        a = node.attributes
        axes = [i for i, size in enumerate(dims[0]) if (a["starts"][i], a["stops"][i]) != (0, size)]
        axes += [i for i, stride in enumerate(a["strides"]) if stride != 1 and i not in axes]
        if not axes:
            return self._add(node, "Identity", operands)
        if any(type(a["stops"][i]) is not int for i in axes):
            raise _error(node, "it cuts the batch")
        limits = [[a[key][i] for i in axes] for key in ("starts", "stops")]
        return self._sliced(node, operands[0], *limits, axes, [a["strides"][i] for i in axes])

    def reverse(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a reversal as a slice with negative strides."""
        axes = node.attributes["axes"]
        backwards = [-1] * len(axes)
        ends = [_BEFORE_FIRST] * len(axes)
        return self._sliced(node, operands[0], backwards, ends, axes, backwards)

    def _sliced(self, node: FloatOp, x: str, *limits: list[int]) -> str:
        names = [self._numbers(values, f"{node.name}/limits") for values in limits]
        return self._add(node, "Slice", [x, *names])

    def pad(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write padding."""
        padding = node.attributes["padding"]
        if any(interior for *_, interior in padding):
            raise _error(node, "it pads between elements")
        pads = [low for low, _, _ in padding] + [high for _, high, _ in padding]
        x, fill = operands
        return self._add(node, "Pad", [x, self._numbers(pads, "pads"), fill])

    def concatenate(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a concatenation."""
        return self._add(node, "Concat", operands, axis=node.attributes["axis"])

    def cast(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a change of the type."""
        return self._add(node, "Cast", operands, to=_element(node, node.attributes["dtype"]))

    def select(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a choice."""
        mask, if_false, if_true = operands
        return self._add(node, "Where", [mask, if_true, if_false])

    def reduce(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a reduction."""
        kind = f"Reduce{node.operation.removeprefix('reduce_').capitalize()}"
        return self._reduced(node, kind, operands[0], node.output)

    def _reduced(self, node: FloatOp, kind: str, x: str, output: str) -> str:
        axes = node.attributes["axes"]
        if kind == "ReduceSum" or self._opset >= _AXES_ARE_INPUT:
            inputs = [x, self._numbers(axes, "axes")]
            return self._builder.add(kind, inputs, output, keepdims=0)
        return self._builder.add(kind, [x], output, axes=axes, keepdims=0)

    def reduce_mask(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a reduction of a mask, as one of integers."""
        kind = {"reduce_and": "ReduceMin", "reduce_or": "ReduceMax"}[node.operation]
        x = self._part(node, "Cast", operands, to=_element(node, "int32"))
        x = self._reduced(node, kind, x, f"{node.name}/count")
        return self._add(node, "Cast", [x], to=_element(node, "bool"))

    def index(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write the place of the largest or smallest element."""
        kind = {"argmax": "ArgMax", "argmin": "ArgMin"}[node.operation]
        found = self._part(node, kind, operands, axis=node.attributes["axis"], keepdims=0)
        return self._add(node, "Cast", [found], to=_element(node, node.dtype))

    def cumsum(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a cumulative sum."""
        axis = self._builder.constant(np.int64(node.attributes["axis"]), "axis")
        reverse = int(node.attributes["reverse"])
        return self._add(node, "CumSum", [*operands, axis], reverse=reverse)

    def dot(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a dot product as an Einsum."""
        contracted, batched = node.attributes["contracted"], node.attributes["batched"]
        letters = iter(_LETTERS)
        left = [next(letters) for _ in dims[0]]
        right = [""] * len(dims[1])
        for pairs in (contracted, batched):
            for i, j in zip(*pairs, strict=True):
                right[j] = left[i]
        right = [letter or next(letters) for letter in right]
        shared = [left[i] for i in batched[0]]
        free = [left[i] for i in range(len(left)) if i not in (*contracted[0], *batched[0])]
        free += [right[j] for j in range(len(right)) if j not in (*contracted[1], *batched[1])]
        equation = f"{''.join(left)},{''.join(right)}->{''.join([*shared, *free])}"
        return self._add(node, "Einsum", operands, equation=equation)

    def conv(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a convolution in ONNX's layout; a dilated input gets its zeros first."""
        a = node.attributes
        if any(end < 0 for pair in a["padding"] for end in pair):
            raise _error(node, "its padding is negative")
        x, weights = (
            self._builder.transpose(name, axes, f"{node.name}/channels_first")
            for name, axes in zip(operands, a["axes"], strict=False)
        )
        spatial = [dims[0][axis] for axis in a["axes"][0][2:]]
        channels = dims[0][a["axes"][0][1]]
        for i, times in enumerate(a["input_dilation"]):
            x = self._dilated(node, x, [channels, *spatial], 1 + i, times)
            spatial[i] = times * (spatial[i] - 1) + 1
        pads = [low for low, _ in a["padding"]] + [high for _, high in a["padding"]]
        window = [dims[1][axis] for axis in a["axes"][1][2:]]
        y = self._part(
            node,
            "Conv",
            [x, weights],
            kernel_shape=window,
            strides=a["strides"],
            dilations=a["dilation"],
            pads=pads,
            group=a["groups"],
        )
        order = a["axes"][2]
        return self._add(node, "Transpose", [y], perm=[order.index(i) for i in range(len(order))])

    def _dilated(self, node: FloatOp, x: str, sizes: list[int], axis: int, times: int) -> str:
        """Put zeros between the elements along an axis; sizes are those after the batch."""
        if times == 1:
            return x
        rank = 1 + len(sizes)
        x = self._part(node, "Unsqueeze", [x, self._numbers([axis + 2], "axes")])
        pads = [0] * (2 * (rank + 1))
        pads[rank + 1 + axis + 2] = times - 1
        x = self._part(node, "Pad", [x, self._numbers(pads, "pads"), self._number(0)])
        sizes = [times * n if i == axis else n for i, n in enumerate(sizes)]
        x = self._part(node, "Reshape", [x, self._numbers([-1, *sizes], "shape")])
        limits = ([0], [sizes[axis] - times + 1], [axis + 1], [1])
        names = [self._numbers(values, f"{node.name}/limits") for values in limits]
        return self._part(node, "Slice", [x, *names])

    def window(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a reduction over windows as a pool."""
        a, rank = node.attributes, len(dims[0])
        plain = a["window"][0] == a["window"][-1] == 1 and a["padding"][0] == a["padding"][-1]
        if rank < 3 or not plain or set(a["input_dilation"]) != {1} or a["padding"][0] != [0, 0]:
            raise _error(node, "its windows are not over the axes between batch and channels")
        attributes = {
            "kernel_shape": a["window"][1:-1],
            "strides": a["strides"][1:-1],
            "pads": [p[0] for p in a["padding"][1:-1]] + [p[1] for p in a["padding"][1:-1]],
        }
        order = channels_first(rank)
        x = self._builder.transpose(operands[0], order, f"{node.name}/channels_first")
        if node.operation == "window_max":
            y = self._part(node, "MaxPool", [x], **attributes, dilations=a["dilation"][1:-1])
        else:
            if set(a["dilation"]) != {1}:
                raise _error(node, "its windows have holes")
            y = self._part(node, "AveragePool", [x], **attributes, count_include_pad=1)
            area = self._number(float(np.prod(attributes["kernel_shape"])))
            y = self._part(node, "Mul", [y, area])
        return self._add(node, "Transpose", [y], perm=channels_last(rank))

    def gather(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write a look-up along one axis, the one kind of gather that ONNX's Gather is."""
        a, (table, indices) = node.attributes, dims
        axis = a["collapsed"][0] if a["collapsed"] else 0
        whole = [1 if i == axis else size for i, size in enumerate(table)]
        if (
            a["sizes"] != whole
            or not a["start_axes"] == a["collapsed"] == [axis]
            or a["batch_axes"]
        ):
            raise _error(node, "it is no look-up along one axis")
        count = len(indices) - 1
        index = self._part(node, "Squeeze", [operands[1], self._numbers([count], "axes")])
        index = self._part(node, "Cast", [index], to=6)  # ONNX takes int32 and int64 alone.
        # ONNX puts the axes of the indices in the place of the table's axis.
        offsets = [i if i < axis else i + count for i in range(len(table) - 1)]
        rest = iter(range(axis, axis + count))
        places = dict(zip(a["offset_axes"], offsets, strict=True))
        order = [places[i] if i in places else next(rest) for i in range(len(table) - 1 + count)]
        if order == sorted(order):
            return self._add(node, "Gather", [operands[0], index], axis=axis)
        found = self._part(node, "Gather", [operands[0], index], axis=axis)
        return self._add(node, "Transpose", [found], perm=order)

    def composed(self, node: FloatOp, operands: list[str], dims: list[list[Any]]) -> str:
        """Write an operation of two operators."""
        x = operands[0]
        match node.operation:
            case "rsqrt":
                return self._add(node, "Reciprocal", [self._part(node, "Sqrt", [x])])
            case "square":
                return self._add(node, "Mul", [x, x])
            case "integer_pow":
                return self._add(node, "Pow", [x, self._number(node.attributes["exponent"])])
            case "exp2":
                return self._add(node, "Pow", [self._number(2), x])
            case "expm1":
                return self._add(node, "Sub", [self._part(node, "Exp", [x]), self._number(1)])
            case "log1p":
                return self._add(node, "Log", [self._part(node, "Add", [x, self._number(1)])])
            case "erfc":
                return self._add(node, "Sub", [self._number(1), self._part(node, "Erf", [x])])
            case "ne":
                return self._add(node, "Not", [self._part(node, "Equal", operands)])
            case "rem":
                return self._add(node, "Mod", operands, fmod=1)
            case "is_finite":
                nan, infinite = (self._part(node, kind, [x]) for kind in ("IsNaN", "IsInf"))
                return self._add(node, "Not", [self._part(node, "Or", [nan, infinite])])
        raise _error(node, "ONNX has no operator for it")


_Writer = Callable[[FloatOpWriter, FloatOp, list[str], list[list[Any]]], str]
_WRITERS: Mapping[str, _Writer] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("rsqrt", "square", "integer_pow", "exp2", "expm1", "log1p", "erfc", "ne", "rem"),
                "is_finite",
            ),
            FloatOpWriter.composed,
        ),
        "reshape": FloatOpWriter.reshape,
        "broadcast": FloatOpWriter.broadcast,
        "transpose": FloatOpWriter.transpose,
        "slice": FloatOpWriter.slice,
        "reverse": FloatOpWriter.reverse,
        "pad": FloatOpWriter.pad,
        "concatenate": FloatOpWriter.concatenate,
        "cast": FloatOpWriter.cast,
        "select": FloatOpWriter.select,
        **dict.fromkeys(
            ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), FloatOpWriter.reduce
        ),
        **dict.fromkeys(("reduce_and", "reduce_or"), FloatOpWriter.reduce_mask),
        **dict.fromkeys(("argmax", "argmin"), FloatOpWriter.index),
        "cumsum": FloatOpWriter.cumsum,
        "dot": FloatOpWriter.dot,
        "conv": FloatOpWriter.conv,
        **dict.fromkeys(("window_max", "window_sum"), FloatOpWriter.window),
        "gather": FloatOpWriter.gather,
    }
)


def _element(node: FloatOp, dtype: str) -> int:
    """Return ONNX's number of a type."""
    numbers = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9}
    numbers |= {"float16": 10, "float64": 11, "uint32": 12}
    if dtype not in numbers:
        raise _error(node, f"ONNX has no type {dtype}")
    return numbers[dtype]


def _error(node: FloatOp, reason: str) -> ExportError:
    return ExportError(
        f"node {node.name!r}: the float operation {node.operation!r} cannot be written to ONNX: "
        f"{reason}."
    )
