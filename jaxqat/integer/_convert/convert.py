# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`convert`: turn a quantized model into an integer graph.

The model's inference program is traced once more. `emit` writes a node for each integer form that
the program evaluates, and the program itself computes every scale, code, bias and multiplier. No
number is computed by other code than in training, so none can differ.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxqat.errors import ConversionError
from jaxqat.integer import graph as g
from jaxqat.integer._convert.fields import finished, finished_node
from jaxqat.integer._convert.table import with_tables
from jaxqat.integer._convert.traced_model import TracedModel
from jaxqat.quant._models.bound import QuantizedModel


def convert(
    model: QuantizedModel,
    *arguments: Any,
    requantization: g.Requantization = "float",
    strict: bool = False,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
    metadata: dict[str, object] | None = None,
    **kwargs: Any,
) -> g.IntegerGraph:
    """Return the integer network of a quantized model.

    Its codes equal those of the model in inference mode with frozen ranges, tensor by tensor
    (`jaxqat.verify` compares them on data). What has no integer form is computed in float32, by
    operations between two integer parts: a float island. Behind one, codes can differ by one where
    two programs round differently.

        graph = jaxqat.convert(model, variables, images, train=False)

    Args:
        model: What `jaxqat.quantize` returned.
        *arguments: The arguments of the model's call: (variables, *inputs), or (*inputs) for a
            model that holds its variables. Only shapes and types of the inputs matter.
        requantization: 'float': one float32 multiplication and a rounding; 'fixed_point': an int32
            multiplier and a rounding shift, no floating point between the input's codes and the
            last accumulator.
        strict: Whether to refuse a model with parts that have no integer form.
        preprocess: Function from uint8 images to the model's float input. Each value must depend on
            the value in its place and its channel alone, as in normalization; this is checked on
            random images. With it the graph takes uint8 images too. For models of one input.
        metadata: Plain data to keep with the graph.
        **kwargs: Keyword arguments of the model's call, such as `train=False`.

    Returns:
        The graph.

    Raises:
        ConversionError: Ranges have seen no data; or parts of the model have no integer form, and
            `strict` is set, or they can be in no island either, as random numbers; the error lists
            each with the reason. Or the network depends on the batch size, or `preprocess` on more
            than a value and its channel.
        QuantizationError: The variables hold no ranges for the model.
    """
    if not isinstance(model, QuantizedModel):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConversionError(
            "convert takes what `jaxqat.quantize` returned, trained or calibrated, got "
            f"{type(model).__name__}."
        )
    requantizations = ("float", "fixed_point")
    if requantization not in requantizations:
        raise ConversionError(
            f"requantization must be one of {', '.join(requantizations)}, got {requantization!r}."
        )
    traced = TracedModel(model, arguments, kwargs, strict)
    emitter, values, nodes = traced.converted()
    nodes = [cls(**finished_node(fields, values)) for cls, fields in nodes]
    tensors = {n: g.Tensor(**finished(fields, values)) for n, fields in emitter.tensors.items()}
    nodes = _needed(nodes, [output.name for output in emitter.outputs])
    kept = {node.output for node in nodes}
    read = {name for node in nodes for name in node.inputs}
    inputs = tuple(each for each in emitter.inputs if each.name in read)
    if preprocess is not None:
        nodes = with_tables(nodes, inputs, tensors, preprocess)
    try:
        return g.IntegerGraph(
            inputs=inputs,
            tensors={name: t for name, t in tensors.items() if name in kept},
            nodes=tuple(nodes),
            outputs=tuple(emitter.outputs),
            requantization=requantization,
            metadata=metadata or {},
        )
    except g.GraphError as error:
        raise ConversionError(f"The model cannot be converted: {error}") from error


def obstacles(model: QuantizedModel, *arguments: Any, **kwargs: Any) -> tuple[str, ...]:
    """Return the parts of a model without an integer form, with the reasons.

    Nothing is computed: only shapes and types of the arguments matter, and ranges may be empty.

    Args:
        model: What `jaxqat.quantize` returned.
        *arguments: As for `convert`.
        **kwargs: Keyword arguments of the model's call, such as `train=False`.
    """
    try:
        TracedModel(model, arguments, kwargs, strict=True).trace()
    except ConversionError as error:
        return error.reasons
    return ()


def _needed(nodes: list[g.Node], outputs: list[str]) -> list[g.Node]:
    """Return the nodes that the outputs depend on."""
    needed, kept = set(outputs), list[g.Node]()
    for node in reversed(nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]
