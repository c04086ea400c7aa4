"""Products in ONNX's terms: weights and geometry of a layer, matrices of two tensors."""

from collections.abc import Sequence

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._onnx.builder import Builder, channels_first
from jaxqat.integer.graph import Affine, MatMul, Product, Quantize

_FLOAT, _INT32 = 1, 6  # ONNX's element types.


def oriented_weights(weights: np.ndarray, kind: str, spatial: int) -> np.ndarray:
    """Return weights in ONNX's layout: (in, out) for a Gemm, (out, in, *window) for a Conv.

    A dense layer with spatial axes is a convolution with a window of 1.
    """
    if spatial == 0:
        return weights
    if kind == "dense":
        weights = weights.reshape(*(1,) * spatial, *weights.shape)
    return weights.transpose(spatial + 1, spatial, *range(spatial))


def geometry(node: Product, spatial: int) -> dict[str, object]:
    """Return the attributes of a Conv with this number of spatial axes.

    Raises:
        ExportError: If the padding is negative.
    """
    padding = node.padding or ((0, 0),) * spatial
    if any(end < 0 for pair in padding for end in pair):
        raise ExportError(
            f"node {node.name!r}: ONNX convolutions need padding of 0 or more, got {padding}."
        )
    return {
        "kernel_shape": list(node.window or (1,) * spatial),
        "strides": list(node.strides or (1,) * spatial),
        "dilations": list(node.dilation or (1,) * spatial),
        "pads": [low for low, _ in padding] + [high for _, high in padding],
        "group": node.groups,
    }


def mat_mul(
    builder: Builder,
    node: MatMul,
    operator: str,
    inputs: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    more: Sequence[str] = (),
) -> str:
    """Write a product of two tensors; return the name of its result, in JAX's layout.

    Args:
        builder: The ONNX graph so far.
        node: The product.
        operator: 'MatMul' or 'MatMulInteger'.
        inputs: Names of the tensors, channels first.
        shapes: Their shapes in JAX's layout, without the batch.
        more: Further inputs of the operator.
    """
    full = [(-1, *shape) for shape in shapes]
    common = [0] * len(node.batched[0])  # For a Reshape: as before.
    one = [len(node.free(side, len(shape))) == 1 for side, shape in enumerate(full)]
    is_matrix = [each and len(node.contracted[0]) == 1 for each in one]
    matrices: list[str] = []
    for side, (x, shape) in enumerate(zip(inputs, full, strict=True)):
        first = channels_first(len(shape))
        axes = [first.index(axis) for axis in node.as_matrices(side, len(shape))]
        x = builder.transpose(x, axes, f"{node.name}/operand{side}")
        if not is_matrix[side]:
            size = np.array([*common, *node.matrix_size(side, shape)], np.int64)
            size = builder.constant(size, f"{node.name}/size{side}")
            x = builder.add("Reshape", [x, size], f"{node.name}/matrices{side}")
        matrices.append(x)
    total = builder.add(operator, [*matrices, *more], f"{node.name}/products")
    if all(one):
        return total
    size = np.array([*common, *node.free_sizes(full)], np.int64)
    size = builder.constant(size, f"{node.name}/size")
    return builder.add("Reshape", [total, size], f"{node.name}/sum")


def affine(builder: Builder, node: Affine, codes: str, zero: int) -> str:
    """Write factors and terms that are constants; return the name of the units, not rounded.

    Args:
        builder: The ONNX graph so far.
        node: The operation.
        codes: Name of the tensor's codes, channels first.
        zero: Their zero point.
    """

    def by(operator: str, x: str, array: np.ndarray, label: str) -> str:
        array = array[None].transpose(channels_first(1 + array.ndim))
        constant = builder.constant(array, f"{node.name}/{label}/by")
        return builder.add(operator, [x, constant], f"{node.name}/{label}")

    total = builder.add("Cast", [codes], f"{node.name}/integers", to=_INT32)
    total = by("Mul", total, node.weights, "weighted")
    # int32 wraps around, so that the order of the additions makes no difference.
    total = by("Add", total, node.bias - np.int32(zero) * node.weights, "sum")
    total = builder.add("Cast", [total], f"{node.name}/float_sum", to=_FLOAT)
    return by("Mul", total, node.multiplier, "units")


def scaled(builder: Builder, node: Quantize, x: str) -> str:
    """Write how an input is shifted and scaled, in JAX's layout; return the name of the result."""
    operators = {"shifts": "Add", "factors": "Mul", "terms": "Add"}
    for field, array in node.coefficients.items():
        constant = builder.constant(array[None], f"{node.name}/{field}")
        x = builder.add(operators[field], [x, constant], f"{node.name}/with_{field}")
    return x
