# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""`describe`: list a model's products, their quantization, and what stays in float."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxqat.analysis._text import aligned
from jaxqat.integer._convert.convert import obstacles
from jaxqat.integer._packing import packed_size
from jaxqat.quant._models.bound import QuantizedModel
from jaxqat.quant._models.quantize import quantize
from jaxqat.quant._plan.plan import CONSTANT_WEIGHTS, NO_WEIGHTS, LayerInfo


@dataclasses.dataclass(frozen=True)
class LayerDescription:
    """A product of the model and its quantization.

    Attributes:
        layer: Path, kind, shape of the weights, bits, and the reason if it stays in float.
        granularity: Scales of the weights, 'per_channel' or 'per_tensor'; '' in float.
        input_range: Smallest and largest real value that the input's codes cover; None if the
            input stays in float or was not observed.
        weight_bytes: Size of the saved weights without scales and bias, in bytes.
    """

    layer: LayerInfo
    granularity: str
    input_range: tuple[float, float] | None
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Description:
    """A model's products, and what has no integer form; `str` gives a table.

    Attributes:
        layers: Products, in the order of computation.
        obstacles: Further parts without an integer form, with the reasons, a line each. `convert`
            computes them in float, and refuses them with `strict=True`.
    """

    layers: tuple[LayerDescription, ...]
    obstacles: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("path", "kind", "weights", "bits", "scales", "input range", "MACs", "bytes")]
        rows += [_cells(layer) for layer in self.layers]
        macs = sum(row.layer.macs for row in self.layers)
        size = sum(row.weight_bytes for row in self.layers)
        quantized = [row for row in self.layers if row.layer.float_reason is None]
        integer_macs = sum(row.layer.macs for row in quantized)
        integer_size = sum(row.weight_bytes for row in quantized)
        rows.append(("total", "", "", "", "", "", f"{macs:,}", f"{size:,}"))
        lines = list(aligned(rows, texts=6))
        if macs:
            lines.append(f"{100 * integer_macs / macs:.1f} % of the MACs multiply integers")
        if size:
            lines.append(f"{100 * integer_size / size:.1f} % of the weights' bytes are codes")
        for row in self.layers:
            if row.layer.float_reason is not None:
                lines.append(f"in float: {row.layer.path}: {row.layer.float_reason}")
        lines += [f"no integer form: {reason}" for reason in self.obstacles]
        return "\n".join(lines)


def describe(model: Any, *arguments: Any, **kwargs: Any) -> Description:
    """Return what quantization makes of a model.

        print(jaxqat.describe(model, variables, images, train=False))

    Args:
        model: What `jaxqat.quantize` or `jaxqat.calibrate` returned; or a model, to be quantized
            by the recipe 'int8'.
        *arguments: The arguments of the model's call: (variables, *inputs), or (*inputs) for a
            model that holds its variables. Only shapes and types of the inputs matter.
        **kwargs: Keyword arguments of the model's call, such as `train=False`.

    Raises:
        QuantizationError: The model cannot be quantized.
    """
    quantized: QuantizedModel = model if isinstance(model, QuantizedModel) else quantize(model)
    bound, inputs = quantized.bind_call(arguments, kwargs)
    table = bound.layers(*inputs)
    # Obstacles do not depend on ranges, so none need to have been observed.
    found = obstacles(bound.with_empty_ranges(*inputs), *inputs)
    told = tuple(f"{layer.path} ({layer.kind}): " for layer in table if layer.float_reason)
    return Description(
        tuple(_described(layer, bound.state) for layer in table),
        tuple(reason for reason in found if not reason.startswith(told)),
    )


def _described(layer: LayerInfo, ranges: Mapping[Any, Any]) -> LayerDescription:
    weightless = layer.kind == "attention" or layer.float_reason in (NO_WEIGHTS, CONSTANT_WEIGHTS)
    weights = 0 if weightless else math.prod(layer.weight_shape)
    bits = layer.weight_bits
    size = 4 * weights if bits is None else packed_size(weights, bits)
    granularity = layer.settings.weight_granularity if layer.settings else ""
    return LayerDescription(layer, granularity, layer.covered(ranges), size)


def _cells(row: LayerDescription) -> tuple[str, ...]:
    layer, shape = row.layer, "x".join(map(str, row.layer.weight_shape))
    bits = f"{layer.weight_bits or 'float'}" + (f"/{layer.act_bits}" if layer.act_bits else "")
    extent = "" if row.input_range is None else "{:.3g} .. {:.3g}".format(*row.input_range)
    if layer.settings and layer.settings.act_range == "dynamic":
        extent = "each example's"
    scales = "" if layer.weight_bits is None else row.granularity.removeprefix("per_")
    return (
        layer.path,
        layer.kind,
        shape,
        bits,
        scales,
        extent,
        f"{layer.macs:,}",
        f"{row.weight_bytes:,}",
    )
