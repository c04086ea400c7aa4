"""Float operations in NumPy float64 and SciPy, written from their names alone."""

import itertools
import string
from typing import Any

import numpy as np
from scipy import special


def evaluate(operation: str, attributes: dict[str, Any], operands: list[Any]) -> Any:
    """The result of an operation; sizes of the batch are numbers already."""
    a = attributes
    x: Any = operands[0] if operands else None
    if operation in _PLAIN:
        return _PLAIN[operation](*operands)
    match operation:
        case "select":
            return np.where(x, operands[2], operands[1])
        case "integer_pow":
            return x ** a["exponent"]
        case "cast":
            return x.astype(a["dtype"])
        case "reduce_sum" | "reduce_max" | "reduce_min" | "reduce_prod":
            return getattr(np, operation.removeprefix("reduce_"))(x, tuple(a["axes"]))
        case "reduce_and" | "reduce_or":
            return (np.all if operation == "reduce_and" else np.any)(x, tuple(a["axes"]))
        case "argmax" | "argmin":
            return getattr(np, operation)(x, a["axis"]).astype(a["dtype"])
        case "cumsum" | "cumprod" | "cummax" | "cummin" | "cumlogsumexp":
            return cumulative(operation, x, a["axis"], a["reverse"])
        case "reshape":
            return x.reshape(a["shape"])
        case "broadcast":
            sizes = [1] * len(a["shape"])
            for size, axis in zip(np.shape(x), a["axes"], strict=True):
                sizes[axis] = size
            return np.broadcast_to(np.reshape(x, sizes), a["shape"])
        case "transpose":
            return np.transpose(x, a["axes"])
        case "reverse":
            return np.flip(x, a["axes"])
        case "slice":
            return x[tuple(map(slice, a["starts"], a["stops"], a["strides"]))]
        case "pad":
            return padded(x, operands[1], a["padding"])
        case "concatenate":
            return np.concatenate(operands, a["axis"])
        case "iota":
            sizes = [1] * len(a["shape"])
            sizes[a["axis"]] = -1
            numbers = np.arange(a["shape"][a["axis"]]).reshape(sizes)
            return np.broadcast_to(numbers, a["shape"]).astype(a["dtype"])
        case "dot":
            return dot(x, operands[1], a["contracted"], a["batched"])
        case "conv":
            return conv(x, operands[1], a)
        case "window_max" | "window_min" | "window_sum":
            return window(operation, x, a)
        case "gather":
            (axis,), index = a["collapsed"], operands[1][..., 0]
            found = np.take(operands[0], index, axis)
            rest = [n for n in range(found.ndim) if not axis <= n < axis + index.ndim]
            return np.moveaxis(found, rest, a["offset_axes"])
    raise ValueError(operation)


_PLAIN = {
    **{name: getattr(np, name) for name in ("abs", "cbrt", "ceil", "cos", "exp", "exp2", "expm1")},
    **{name: getattr(np, name) for name in ("floor", "log", "log1p", "sign", "sin", "sqrt")},
    **{name: getattr(np, name) for name in ("square", "tan", "tanh")},
    "erf": special.erf,
    "erfc": special.erfc,
    "logistic": special.expit,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "is_finite": np.isfinite,
    "neg": np.negative,
    "not": np.logical_not,
    "round": np.round,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "rem": np.fmod,
    "atan2": np.arctan2,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def cumulative(operation, x, axis, reverse):
    x = np.flip(x, axis) if reverse else x
    functions = {"cumsum": np.add, "cumprod": np.multiply, "cummax": np.maximum}
    functions |= {"cummin": np.minimum, "cumlogsumexp": np.logaddexp}
    found = functions[operation].accumulate(x, axis)
    return np.flip(found, axis) if reverse else found


def padded(x, fill, padding):
    """Padding before, after and between elements; negative padding crops."""
    for axis, (low, high, interior) in enumerate(padding):
        size = x.shape[axis]
        apart = np.full((*x.shape[:axis], size + (size - 1) * interior, *x.shape[axis + 1 :]), fill)
        where = [slice(None)] * x.ndim
        where[axis] = slice(None, None, 1 + interior)
        apart[tuple(where)] = x
        sides = [(0, 0)] * x.ndim
        sides[axis] = (max(low, 0), max(high, 0))
        x = np.pad(apart, sides, constant_values=fill)
        where[axis] = slice(max(-low, 0), min(high, 0) or None)
        x = x[tuple(where)]
    return x


def dot(x, y, contracted, batched):
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in x.shape]
    right = [next(letters) for _ in y.shape]
    for pairs in (contracted, batched):
        for i, j in zip(*pairs, strict=True):
            right[j] = left[i]
    free = [c for c in left if c not in right] + [c for c in right if c not in left]
    out = "".join([left[i] for i in batched[0]] + free)
    return np.einsum(f"{''.join(left)},{''.join(right)}->{out}", x, y)


def conv(x, kernel, a):
    """A convolution by its definition, tap by tap."""
    x, kernel = x.transpose(a["axes"][0]), kernel.transpose(a["axes"][1])  # N C, O I first.
    spatial = [(0, 0, d - 1) for d in a["input_dilation"]]
    x = padded(padded(x, 0.0, [(0, 0, 0), (0, 0, 0), *spatial]), 0.0,
               [(0, 0, 0), (0, 0, 0), *((low, high, 0) for low, high in a["padding"])])  # fmt: skip
    groups, (outputs, inputs, *extent) = a["groups"], kernel.shape
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape[2:], a["dilation"], extent, a["strides"], strict=True)
    ]
    y = np.zeros((len(x), outputs, *sizes))
    for tap in itertools.product(*map(range, extent)):
        where = tuple(
            slice(d * i, d * i + s * (n - 1) + 1, s)
            for i, d, s, n in zip(tap, a["dilation"], a["strides"], sizes, strict=True)
        )
        part = x[(slice(None), slice(None), *where)]
        for group in range(groups):
            ours = slice(group * outputs // groups, (group + 1) * outputs // groups)
            theirs = part[:, group * inputs : (group + 1) * inputs]
            y[:, ours] += np.einsum("ni...,oi->no...", theirs, kernel[(ours, slice(None), *tap)])
    return np.transpose(y, np.argsort(a["axes"][2]))


def window(operation, x, a):
    fill = {"window_max": -np.inf, "window_min": np.inf, "window_sum": 0.0}[operation]
    assert set(a["input_dilation"]) == {1}
    x = padded(x, fill, [(low, high, 0) for low, high in a["padding"]])
    reduce = {"window_max": np.maximum, "window_min": np.minimum, "window_sum": np.add}[operation]
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape, a["dilation"], a["window"], a["strides"], strict=True)
    ]
    y = np.full(sizes, fill)
    for tap in itertools.product(*map(range, a["window"])):
        where = tuple(
            slice(d * i, d * i + s * (n - 1) + 1, s)
            for i, d, s, n in zip(tap, a["dilation"], a["strides"], sizes, strict=True)
        )
        y = reduce(y, x[where])
    return y
