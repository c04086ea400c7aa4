"""What is to be quantized in a traced computation, as plain data; `trace` finds it."""

import dataclasses

from jaxqat.quant.ops import QuantizedProduct
from jaxqat.quant.program import Atom, Node, Program
from jaxqat.quant.recipe import Recipe

Key = tuple[str, ...]

# What a value depends on, in this order: it takes the largest of what it is made of.
PARAMETERS, STATISTICS, DATA = 0, 1, 2

LEFT_BY_RECIPE = "the recipe leaves it in float"
NO_WEIGHTS = "both operands depend on the data"


class QuantizationError(ValueError):
    """A computation cannot be quantized as asked."""


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One product of the model, and what quantization makes of it.

    Attributes:
        path: Path of its parameter's module, such as 'stage1/block0/conv1'.
        kind: 'conv' or 'dense'.
        weight_shape: Shape of the weights.
        weight_bits: Width of the weight codes; None if the layer stays in float.
        act_bits: Width of its input's codes; None if the layer stays in float.
        macs: Multiply-accumulates for the traced input (all its examples).
        weight_path: Path of the parameter itself.
        range_key: Where the state holds the range of its input; None if it stays in float.
        float_reason: Why the layer stays in float; None if it does not.
    """

    path: str
    kind: str
    weight_shape: tuple[int, ...]
    weight_bits: int | None
    act_bits: int | None
    macs: int
    weight_path: Key
    range_key: Key | None
    float_reason: str | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized product: its module's path, which operand is what, how it is multiplied."""

    path: str
    how: QuantizedProduct
    data: int
    weights: Atom


@dataclasses.dataclass(frozen=True)
class Site:
    """A tensor to quantize: where its range is kept, and how wide its codes are."""

    key: Key
    bits: int


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A program and what to quantize in it.

    Attributes:
        program: The traced computation.
        level: What each variable depends on.
        layers: Quantized products by node.
        sites: Tensors to quantize by variable.
        table: Every product, quantized or not, in order.
    """

    program: Program
    level: list[int]
    layers: dict[Node, Layer]
    sites: dict[int, Site]
    table: tuple[LayerInfo, ...]

    def check_rules(self, recipe: Recipe) -> None:
        """Refuses a rule of the recipe that decides about no layer (`Recipe.check_rules`)."""
        able = [i for i in self.table if i.float_reason in (None, LEFT_BY_RECIPE)]
        recipe.check_rules([(info.path, info.kind) for info in able])
