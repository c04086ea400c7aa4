"""One or more examples of every float operation, and a graph with two float islands."""

from typing import Any, NamedTuple

import numpy as np
from integer.graphs import Maker

from jaxqat.integer import graph as g

BATCH = {"batch": 1}
N = 3  # Size of the batch.
RNG = np.random.default_rng(0)


class Case(NamedTuple):
    """An operation on the network's input, and on constants.

    Attributes:
        operation: Its name.
        attributes: Its attributes.
        shape: Shape of the input without the batch.
        output: Shape of the result, with the batch.
        constants: For each operand, its value; None for the input.
        dtype: Type of the result.
        kind: What the input holds: 'any', 'positive' or 'rows' (indices).
    """

    operation: str
    attributes: dict[str, Any] = {}  # noqa: RUF012
    shape: tuple[int, ...] = (4, 5)
    output: list[Any] | None = None
    constants: tuple[Any, ...] = (None,)
    dtype: str = "float32"
    kind: str = "any"

    @property
    def reads(self) -> int:
        """How many operands are the input."""
        return sum(value is None for value in self.constants)

    def input(self) -> np.ndarray:
        rng = np.random.default_rng(1)
        if self.kind == "rows":
            return rng.integers(0, 7, (N, *self.shape)).astype(np.int32)
        values = rng.normal(size=(N, *self.shape)).astype(np.float32)
        return np.abs(values) + np.float32(0.1) if self.kind == "positive" else values

    def node(self) -> g.FloatOp:
        shape = [BATCH, *self.shape] if self.output is None else self.output
        return g.FloatOp(
            name="op", inputs=(g.INPUT,) * self.reads, output="result",
            operation=self.operation, attributes=self.attributes, shape=shape, dtype=self.dtype,
            constants=tuple(c if c is None else np.asarray(c) for c in self.constants),
        )  # fmt: skip

    def graph(self) -> g.IntegerGraph:
        node = self.node()
        return g.IntegerGraph(
            inputs=(g.Input(shape=self.shape, type="int32" if self.kind == "rows" else "float32"),),
            tensors={}, nodes=(node,),
            outputs=(g.Output(name="result", shape=tuple(node.shape[1:])),),
        )  # fmt: skip


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def windows(window, strides=None, padding=None, dilation=None) -> dict[str, Any]:
    rank = len(window)
    ones = [1] * rank
    return {
        "window": window, "strides": strides or ones, "padding": padding or [[0, 0]] * rank,
        "dilation": dilation or ones, "input_dilation": ones,
    }  # fmt: skip


def convolution(**changes) -> dict[str, Any]:
    return {
        "strides": [1, 1], "padding": [[1, 1], [1, 0]], "dilation": [1, 1],
        "input_dilation": [1, 1], "axes": [[0, 3, 1, 2], [3, 2, 0, 1], [0, 3, 1, 2]], "groups": 1,
        "dtype": "float32", **changes,
    }  # fmt: skip


OTHER = normal(4, 5)[None]
MASK = RNG.random((1, 4, 5)) > 0.5
_POSITIVE = ("log", "log1p", "rsqrt", "sqrt")
_MASKS = ("eq", "ne", "lt", "le", "gt", "ge")
GATHER = {
    "offset_axes": [2], "collapsed": [0], "start_axes": [0], "batch_axes": [],
    "start_batch_axes": [], "sizes": [1, 6], "mode": "clip",
}  # fmt: skip

CASES = {
    **{
        name: Case(name)
        for name in (
            *("abs", "cbrt", "ceil", "cos", "erf", "erfc", "exp", "exp2", "expm1", "floor"),
            *("logistic", "neg", "round", "sign", "sin", "square", "tan", "tanh"),
        )
    },
    **{name: Case(name, kind="positive") for name in _POSITIVE},
    "is_finite": Case("is_finite", dtype="bool"),
    "not": Case("not", constants=(MASK[0],), shape=(), output=[BATCH], dtype="bool"),
    **{
        name: Case(name, constants=(None, OTHER))
        for name in ("add", "sub", "mul", "div", "max", "min", "rem", "atan2")
    },
    "a number": Case("add", constants=(None, np.float32(0.5))),
    "pow": Case("pow", constants=(None, OTHER), kind="positive"),
    **{name: Case(name, constants=(None, OTHER), dtype="bool") for name in _MASKS},
    "select": Case("select", constants=(MASK, None, OTHER)),
    "integer_pow": Case("integer_pow", {"exponent": 3}),
    "a reciprocal": Case("integer_pow", {"exponent": -2}, kind="positive"),
    "cast": Case("cast", {"dtype": "int32"}, dtype="int32"),
    **{
        name: Case(name, {"axes": [1]}, output=[BATCH, 5])
        for name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
    },
    "argmax": Case("argmax", {"axis": 2, "dtype": "int32"}, output=[BATCH, 4], dtype="int32"),
    "argmin": Case("argmin", {"axis": 1, "dtype": "int32"}, output=[BATCH, 5], dtype="int32"),
    **{
        name: Case(name, {"axis": 2, "reverse": reverse})
        for name, reverse in (
            *(("cumsum", True), ("cumprod", False), ("cummax", True), ("cummin", False)),
            ("cumlogsumexp", False),
        )
    },
    "reshape": Case("reshape", {"shape": [BATCH, 20]}, output=[BATCH, 20]),
    "reshape to more examples": Case(
        "reshape", {"shape": [{"batch": 4}, 5]}, output=[{"batch": 4}, 5]
    ),
    "broadcast": Case(
        "broadcast", {"shape": [BATCH, 2, 4, 5], "axes": [0, 2, 3]}, output=[BATCH, 2, 4, 5]
    ),
    "broadcast to the batch": Case(
        "broadcast", {"shape": [BATCH, 2], "axes": [1]}, shape=(), output=[BATCH, 2],
        constants=(normal(2),),
    ),
    "transpose": Case("transpose", {"axes": [0, 2, 1]}, output=[BATCH, 5, 4]),
    "reverse": Case("reverse", {"axes": [2]}),
    "slice": Case(
        "slice", {"starts": [0, 1, 0], "stops": [BATCH, 4, 5], "strides": [1, 1, 2]},
        output=[BATCH, 3, 3],
    ),
    "pad": Case(
        "pad", {"padding": [[0, 0, 0], [1, 2, 0], [0, 1, 0]]}, output=[BATCH, 7, 6],
        constants=(None, np.float32(0.5)),
    ),
    "pad inside": Case(
        "pad", {"padding": [[0, 0, 0], [-1, 2, 1], [0, 0, 0]]}, output=[BATCH, 8, 5],
        constants=(None, np.float32(0)),
    ),
    "concatenate": Case(
        "concatenate", {"axis": 2}, output=[BATCH, 4, 10], constants=(None, None)
    ),
    "iota": Case(
        "iota", {"shape": [BATCH, 4], "axis": 1, "dtype": "int32"}, shape=(), output=[BATCH, 4],
        constants=(), dtype="int32",
    ),
    "dot": Case(
        "dot", {"contracted": [[2], [0]], "batched": [[], []], "dtype": "float32"},
        output=[BATCH, 4, 6], constants=(None, normal(5, 6)),
    ),
    "dot of a batch": Case(
        "dot", {"contracted": [[1], [1]], "batched": [[0], [0]], "dtype": "float32"},
        output=[BATCH, 5, 5], constants=(None, None),
    ),
    "conv": Case(
        "conv", convolution(), (6, 5, 4), [BATCH, 6, 4, 3], (None, normal(3, 3, 4, 3))
    ),
    "strided conv of groups": Case(
        "conv", convolution(strides=[2, 1], groups=2, dilation=[1, 2]), (6, 5, 4),
        [BATCH, 3, 2, 6], (None, normal(3, 3, 2, 6)),
    ),
    "transposed conv": Case(
        "conv", convolution(input_dilation=[2, 3]), (4, 5, 4), [BATCH, 7, 12, 3],
        (None, normal(3, 3, 4, 3)),
    ),
    "channels first": Case(
        "conv", convolution(axes=[[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]), (4, 6, 5),
        [BATCH, 3, 6, 4], (None, normal(3, 4, 3, 3)),
    ),
    "window_max": Case(
        "window_max", windows([1, 3, 2, 1], [1, 2, 1, 1], [[0, 0], [1, 1], [0, 1], [0, 0]]),
        (6, 5, 4), [BATCH, 3, 5, 4],
    ),
    "window_min": Case("window_min", windows([1, 2, 2, 1]), (6, 5, 4), [BATCH, 5, 4, 4]),
    "window_sum": Case(
        "window_sum", windows([1, 2, 2, 1], [1, 2, 2, 1], [[0, 0], [0, 0], [1, 0], [0, 0]]),
        (6, 5, 4), [BATCH, 3, 3, 4],
    ),
    "gather": Case(
        "gather", GATHER, (4, 1), [BATCH, 4, 6], (normal(7, 6), None), kind="rows"
    ),
}  # fmt: skip


def island(**options) -> g.IntegerGraph:
    """Make a swish between two convolutions, and a softmax at the end."""
    m = Maker((7, 6, 3), **options)
    batch, (rows, columns, _) = {"batch": 1}, m.shape
    x = m.requantized(m.conv_values("conv1", m.quantize(), 6)[0], None, "conv1/real")
    m.reals[x] = m.run_real(m.nodes[-1])
    shape = [batch, rows, columns, 6]
    gate = m.float_op("logistic", "logistic", [x], shape)
    x = m.float_op("swish", "mul", [x, gate], shape)
    grid = m.grid(m.reals[x])
    x = m.emit(
        g.Quantize(
            name="again", inputs=(x,), output="swish/codes", inverse=np.float32(1) / grid.scale
        ),
        grid,
    )
    x = m.head(m.average("mean", m.conv("conv2", x, 8)))
    m.reals[x] = m.run_real(m.nodes[-1])
    x = m.float_op("exp", "exp", [x], [batch, 5])
    total = m.float_op("total", "reduce_sum", [x], [batch], {"axes": [1]})
    total = m.float_op("column", "reshape", [total], [batch, 1], {"shape": [batch, 1]})
    m.float_op("softmax", "div", [x, total], [batch, 5])
    return m.finish("softmax")
