"""ONNX nodes that only move codes, in ONNX's layout. They work on uint8 codes directly."""

import numpy as np

from jaxqat.export._onnx.builder import Builder, channels_first, channels_last
from jaxqat.integer.graph import Concat, MaxPool, Move, SumPool

_BEFORE_FIRST = np.iinfo(np.int64).min + 1  # End of a slice with a negative stride.


def axis_first(axis: int, rank: int) -> int:
    """Return the position in ONNX's layout of an axis of JAX's layout."""
    return channels_first(rank).index(axis)


def move(builder: Builder, node: Move, codes: str, rank: int, zero: np.generic) -> str:
    """Write a move.

    Args:
        builder: ONNX graph to extend.
        node: Move to write.
        codes: Name of the source, channels first.
        rank: Rank of the source, including the batch.
        zero: Value of padding.

    Returns:
        Name of the result, channels first.
    """
    name = f"{node.output}/codes"
    order = channels_first(rank)
    match node.kind:
        case "reshape":
            codes = builder.transpose(codes, channels_last(rank), f"{node.name}/channels_last")
            shape = builder.constant(np.array([0, *node.shape], np.int64), f"{node.name}/shape")
            codes = builder.add("Reshape", [codes, shape], f"{node.name}/reshaped")
            return builder.transpose(codes, channels_first(1 + len(node.shape)), name)
        case "transpose":
            return builder.transpose(codes, [order.index(node.axes[a]) for a in order], name)
        case "reverse":
            axes = [axis_first(axis, rank) for axis in node.axes]
            ends = [[-1] * len(axes), [_BEFORE_FIRST] * len(axes), axes, [-1] * len(axes)]
        case "slice":
            axes = [axis for axis in range(1, rank)]
            ends = [[field[order[a]] for a in axes] for field in (node.starts, node.stops)]
            ends += [axes, [node.strides[order[a]] for a in axes]]
        case "take":
            indices = builder.constant(np.array(node.indices, np.int64), f"{node.name}/indices")
            return builder.add("Gather", [codes, indices], name, axis=axis_first(node.axis, rank))
        case "pad":
            pads = [node.padding[a][side] for side in (0, 1) for a in order]
            pads = builder.constant(np.array(pads, np.int64), f"{node.name}/pads")
            zero_name = builder.constant(zero, f"{node.name}/zero_point")
            return builder.add("Pad", [codes, pads, zero_name], name)
    limits = [
        builder.constant(np.array(values, np.int64), f"{node.name}/{field}")
        for field, values in zip(("starts", "ends", "axes", "steps"), ends, strict=True)
    ]
    return builder.add("Slice", [codes, *limits], name)


def window_attributes(node: MaxPool | SumPool) -> dict[str, object]:
    """Return the window attributes of a pool in ONNX's form."""
    return {
        "kernel_shape": list(node.window),
        "strides": list(node.strides),
        "pads": [low for low, _ in node.padding] + [high for _, high in node.padding],
    }


def max_pool(builder: Builder, node: MaxPool, codes: str) -> str:
    """Write a MaxPool; ONNX ignores padding too."""
    return builder.add("MaxPool", [codes], f"{node.output}/codes", **window_attributes(node))


def concat(builder: Builder, node: Concat, codes: list[str], rank: int) -> str:
    """Write a Concat."""
    return builder.add("Concat", codes, f"{node.output}/codes", axis=axis_first(node.axis, rank))
