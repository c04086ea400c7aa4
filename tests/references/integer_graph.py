"""An interpreter of integer graphs in NumPy int64, written from the equations of the data model.

It takes from the library the dataclasses that it reads, and nothing else. The one float operation
of a requantization, float32(acc) * multiplier and its rounding, is float32 here as it is there.
"""

import itertools
import math

import numpy as np
from references import float_ops

from jaxqat.integer import graph as g
from jaxqat.integer._nodes.float_op import at_batch
from jaxqat.integer._results import nested


def run(graph, images):
    """Codes of every tensor (int8, by name) and the result, for a batch of images.

    Args:
        graph: An `IntegerGraph`.
        images: (batch, *graph.input_shape): float32, or uint8 if the graph has a table; a tuple of
            arrays for a graph of several inputs.
    """
    arrays = images if isinstance(images, tuple) else (images,)
    reals = {each.name: x for each, x in zip(graph.inputs, arrays, strict=True)}
    codes = {}
    for node in graph.nodes:
        steps = step(node, graph.tensors, codes, arrays[0], graph.requantization, reals)
        if node.output not in graph.tensors:
            reals[node.output] = steps
            continue
        codes[node.output] = stored(graph.tensors[node.output], steps)
    results = [real(output.name, graph.tensors, codes, reals) for output in graph.outputs]
    results = [x.astype(np.float32) if x.dtype == np.float64 else x for x in results]
    return codes, nested(graph.outputs, results)


def real(name, tensors, codes, reals):
    """Real numbers: of a tensor of codes, or what a node made."""
    if name not in tensors:
        assert reals is not None
        return reals[name]
    tensor = tensors[name]
    return (codes[name].astype(np.float32) - tensor.zero_point) * tensor.scale


def stored(tensor, steps):
    """Steps on the tensor's grid (codes less the zero point) as the codes that it holds."""
    assert steps.dtype == np.int64
    return np.clip(steps + tensor.zero_point, tensor.low, tensor.high).astype(np.int8)


def step(node, tensors, codes, images=None, requantization="float", reals=None) -> np.ndarray:
    """What a node makes, in steps of its output's grid (int64), or its real result (float32)."""
    if isinstance(node, g.FloatOp):
        return float_op(node, [real(name, tensors, codes, reals) for name in node.inputs], images)
    of_codes = [] if isinstance(node, g.Quantize) else node.inputs
    inputs = [codes[name].astype(np.int64) - tensors[name].zero_point for name in of_codes]
    is_real = node.output not in tensors

    def rescaled(total, multiplier):
        if is_real:
            return total.astype(np.float32) * multiplier
        return rounded(total, multiplier, requantization)

    match node:
        case g.Quantize():
            assert reals is not None
            return quantized(node, reals[node.inputs[0]], tensors[node.output].zero_point)
        case g.Product():
            return rescaled(product(node, inputs[0]) + node.bias, node.multiplier)
        case g.Add():
            zero = tensors[node.output].zero_point
            return summed(inputs, node.factors, node.shift, zero) - zero
        case g.Multiply():
            return rescaled(inputs[0] * inputs[1], node.multiplier)
        case g.MatMul():
            return rescaled(paired(node, *inputs), node.multiplier)
        case g.Affine():
            return rescaled(inputs[0] * node.weights + node.bias, node.multiplier)
        case g.Requantize():
            return rescaled(inputs[0], node.multiplier)
        case g.SumPool():
            total = windows(inputs[0], node, fill=0).sum(0)
            axes = tuple(range(1, 1 + len(node.window)))
            return rescaled(total.squeeze(axes) if node.drop_axes else total, node.multiplier)
        case g.Table():
            entries = inputs[0] + tensors[node.inputs[0]].zero_point + 128
            if node.table.ndim == 2:
                found = node.table[entries, np.arange(node.table.shape[1])]
            else:
                found = node.table[entries]
            return found.astype(np.int64) - tensors[node.output].zero_point
        case g.MaxPool():
            return windows(inputs[0], node, fill=-1000).max(0)
        case g.Move():
            return moved(node, inputs[0])
        case g.Concat():
            return np.concatenate(inputs, node.axis)
        case g.FloatOp():
            raise AssertionError("made above")
    raise TypeError(f"no such node: {type(node).__name__}")


def float_op(node, inputs, images):
    """An operation on real numbers, in float64 and rounded to float32."""
    waiting = iter(inputs)
    operands = [next(waiting) if c is None else c for c in node.constants]
    operands = [x.astype(np.float64) if x.dtype == np.float32 else x for x in operands]
    attributes = {key: at_batch(value, len(images)) for key, value in node.attributes.items()}
    found = np.asarray(float_ops.evaluate(node.operation, attributes, operands))
    return found.astype(node.dtype)


def quantized(node, images, zero_point):
    """The input in steps."""
    if images.dtype == np.uint8 and node.table is not None:
        channels = np.arange(images.shape[-1])
        return node.table[images, channels].astype(np.int64) - zero_point
    real = images.astype(np.float32)
    if node.factors is not None:
        real = (real + node.shifts) * node.factors + node.terms
    scaled = np.round(real * np.float32(node.inverse))
    scaled = np.where(np.isnan(scaled), 0, scaled)  # Steps less the zero point.
    return np.clip(scaled, -1000, 1000).astype(np.int64)  # Far outside of any grid.


def summed(terms, factors, shift, zero):
    """round(sum(term * factor) / 2**shift + zero), half to even, in 64-bit integers."""
    total = sum(term * factor for term, factor in zip(terms, factors, strict=True))
    whole, rest = np.divmod(total + zero * 2**shift, 2**shift)
    up = (2 * rest > 2**shift) | ((2 * rest == 2**shift) & (whole % 2 == 1))
    return whole + up


def rounded(total, multiplier, requantization):
    """round(total * multiplier), by the float or the integer definition."""
    if requantization == "float":
        return np.round(total.astype(np.float32) * np.float32(multiplier)).astype(np.int64)
    multiplier = np.broadcast_to(multiplier, total.shape[1:])
    found = np.empty_like(total)
    for m in np.unique(multiplier):
        found[:, multiplier == m] = shifted(total[:, multiplier == m], float(m))
    return found


def shifted(total, multiplier):
    """floor((total * M + 2**(shift - 1)) / 2**shift), with M of 31 bits, M / 2**shift = m."""
    fraction, exponent = math.frexp(multiplier)  # m = fraction * 2**exponent, 0.5 <= fraction < 1.
    mantissa, shift = round(fraction * 2**31), 31 - exponent
    assert 2**30 <= mantissa < 2**31 and shift > 0
    assert np.abs(total).max(initial=0) < 2**31
    if shift > 62:  # |total * M| < 2**62 is less than half of 2**shift.
        return np.zeros_like(total)
    return (total * mantissa + (1 << (shift - 1))) >> shift


def padded(x, padding, fill):
    """Spatial axes padded, or cropped for negative padding."""
    x = np.pad(
        x,
        ((0, 0), *((max(a, 0), max(b, 0)) for a, b in padding), (0, 0)),
        constant_values=fill,
    )
    crop = [slice(max(-a, 0), min(b, 0) or None) for a, b in padding]
    return x[(slice(None), *crop)]


def taps(x, window, strides, dilation):
    """For each tap of a window, its index and the elements that it meets."""
    for tap in itertools.product(*map(range, window)):
        where = []
        for size, extent, stride, apart, i in zip(
            x.shape[1:], window, strides, dilation, tap, strict=False
        ):
            last = size - apart * (extent - 1) - 1  # Where the first tap of the last window is.
            where.append(slice(apart * i, apart * i + last + 1, stride))
        yield tap, x[(slice(None), *where)]


def windows(x, node, fill):
    """(taps, batch, *spatial, channels): the elements of every window of a pool."""
    x = padded(x, node.padding, fill)
    return np.stack([part for _, part in taps(x, node.window, node.strides, (1,) * len(x.shape))])


def product(node, x):
    """Sums of products of codes, int64."""
    w = node.weights.astype(np.int64)
    if node.kind == "dense":
        return x @ w
    x = padded(x, node.padding, 0)
    outputs, inputs = w.shape[-1], w.shape[-2]
    terms = []
    for tap, part in taps(x, w.shape[:-2], node.strides, node.dilation):
        groups = [
            part[..., i * inputs : (i + 1) * inputs]
            @ w[tap][:, i * outputs // node.groups : (i + 1) * outputs // node.groups]
            for i in range(node.groups)
        ]
        terms.append(np.concatenate(groups, -1))
    return np.sum(terms, axis=0)


def paired(node, left, right):
    """Sums of products of two tensors over common axes, int64."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = [[""] * left.ndim, [""] * right.ndim]
    shared = [zip(*axes, strict=True) for axes in (node.batched, node.contracted)]
    result = []
    for is_summed, pairs in enumerate(shared):
        for here, there in pairs:
            names[0][here] = names[1][there] = letter = next(letters)
            result += [] if is_summed else [letter]
    for side in names:
        for axis, name in enumerate(side):
            if not name:
                side[axis] = next(letters)
                result.append(side[axis])
    terms = ",".join("".join(side) for side in names)
    return np.einsum(f"{terms}->{''.join(result)}", left, right)


def moved(node, x):
    """Steps moved; a step of 0 is a real zero."""
    match node.kind:
        case "reshape":
            return x.reshape(len(x), *node.shape)
        case "transpose":
            return x.transpose(node.axes)
        case "reverse":
            return np.flip(x, node.axes)
        case "pad":
            return np.pad(x, node.padding)
        case "slice":
            stops = (len(x), *node.stops[1:])
            return x[tuple(map(slice, node.starts, stops, node.strides))]
        case "take":
            return np.take(x, node.indices, node.axis)
    raise TypeError(f"no such move: {node.kind}")
