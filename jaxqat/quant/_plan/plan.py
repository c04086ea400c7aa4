# pyright: strict, reportUnknownMemberType=false
"""What to quantize in a traced program, as plain data; `planner` decides it."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxqat.quant._numerics.grids import Grid, grid, with_scale
from jaxqat.quant._numerics.multiply import ProductQuantizer
from jaxqat.quant._numerics.products import Dot
from jaxqat.quant._numerics.promotion import default_promotion
from jaxqat.quant._numerics.ranges import empty_range
from jaxqat.quant._numerics.weights import WeightQuantizer
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import Atom, Program, TracedNode
from jaxqat.quant.recipe import Recipe, Settings

# What a value depends on: the largest of its operands' levels. Variables of the model that are not
# parameters have a level of their own, as batch norm's running statistics.
CONSTANTS, VARIABLES, PARAMETERS, STATISTICS, DATA = 0, 1, 2, 3, 4

# The leaf of a tensor's state that gradients train, by the method in `Settings.act_range`.
LEARNED = {"lsq": "step", "pact": "bound"}

# Where a tensor is quantized: a variable, or the operand of a residual addition. In the second case
# other readers of the variable see it as it is.
Place = int | tuple[TracedNode, int]

LEFT_BY_RECIPE = "the recipe leaves it in float"
NO_WEIGHTS = "both operands depend on the data"
CONSTANT_WEIGHTS = "one operand is a constant, not a parameter"
VARIABLE_WEIGHTS = "one operand is a variable, not a parameter; only a rule quantizes it"


def by_call(keys: Iterable[Key]) -> dict[Key, list[Key]]:
    """Return keys of ranges grouped by layer, ignoring the call number.

    A layer that is called twice has the keys 'head/input' and 'head/input2', in the order of its
    calls; likewise sums, pools and products of two activations with the same module.
    """
    groups: dict[Key, list[Key]] = {}
    for key in keys:
        groups.setdefault((*key[:-1], re.sub(r"\d+$", "", key[-1])), []).append(key)
    return groups


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized product of activations and weights.

    Attributes:
        index: Place in the plan's table.
        path: Path of its module.
        quantizer: The product and the quantizer of its weights.
        data: The activations that it reads.
        weights: The weights.
        step_size_key: Key of the weights' learned step sizes in the state, if they have any.
        dynamic: Whether each example has a range of its own, computed when the program runs.
    """

    index: int
    path: str
    quantizer: ProductQuantizer
    data: int
    weights: Atom
    step_size_key: Key | None = None
    dynamic: bool = False


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A quantized table of embeddings; a look-up gives dequantized rows."""

    index: int
    path: str
    quantizer: WeightQuantizer
    weights: Atom
    step_size_key: Key | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A product of two quantized activations, as in attention."""

    index: int
    path: str
    dot: Dot
    left: int
    right: int
    dtype: Any


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A tensor to quantize.

    Attributes:
        key: Key of its range in the state.
        settings: Its settings.
        readers: If no layer reads it, keys of the quantized tensors that are computed from it: from
            a residual addition, the input of a pool, or a term of a residual addition.
        other_term: Key of the other term, if this is a term of a residual addition and read by
            nothing else.
        producers: Paths of layers and keys of tensors from whose codes the residual addition is
            computed, if this is a term of one.
        factor: By how much it is larger in this mode than in inference (`Origins.factor`). Its
            range is that of inference.
    """

    key: Key
    settings: Settings
    readers: tuple[Key, ...] = ()
    other_term: Key | None = None
    producers: tuple[str | Key, ...] = ()
    factor: float = 1.0

    @property
    def bits(self) -> int:
        """Width of the codes."""
        assert self.settings.act_bits is not None
        return self.settings.act_bits

    @property
    def learned(self) -> Literal["lsq", "pact"] | None:
        """Method that learns its scale; None if it is not learned."""
        method = self.settings.act_range
        return method if method == "lsq" or method == "pact" else None

    @property
    def leaf(self) -> str | None:
        """The leaf of its state that gradients train; None if there is none."""
        return LEARNED.get(self.settings.act_range)

    def grid(self, low: Any, high: Any, learned: Any = None) -> Grid:
        """Return the grid of a range, with a learned step size or bound if there is one."""
        symmetric = self.settings.activations == "symmetric"
        found = grid(low, high, bits=self.bits, symmetric=symmetric)
        if learned is None:
            return found
        return with_scale(found, learned if self.leaf == "step" else learned / found.top)

    def covered(self, state: Any) -> tuple[float, float] | None:
        """Return the smallest and largest real value of its codes; None before the first batch."""
        if state is None or int(state["count"]) == 0:
            return None
        if self.leaf is None:
            return float(state["min"]), float(state["max"])
        low, high = self.extent(state)
        return float(low), float(high)

    @default_promotion
    def extent(self, state: Any) -> tuple[Any, Any]:
        """Return the smallest and largest real value of its grid."""
        learned = None if self.leaf is None else state[self.leaf]
        found = self.grid(state["min"], state["max"], learned)
        low, high = (found.scale * (code - found.zero) for code in (found.low, found.high))
        return low, high

    def empty(self) -> Any:
        """Return its state before the first batch."""
        leaf = self.leaf
        return {**empty_range(), **({leaf: jnp.ones((), jnp.float32)} if leaf else {})}


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout: select(mask, zeros, factor * tensor), or tensor * (mask * factor).

    Attributes:
        tensor: The tensor before it.
        scaling: The operation that multiplies the tensor.
        place: Which operand of the last operation holds the kept elements.
        factor: 1 / (1 - p), for the probability p to drop an element.
    """

    tensor: int
    scaling: TracedNode
    place: int
    factor: float


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One product of the model, and its quantization.

    Attributes:
        path: Path of its parameter's module, such as 'stage1/block0/conv1'.
        kind: 'conv', 'dense', 'embed' (a table of embeddings), 'attention' (a product of two
            activations) or 'any' (products inside a call that stays whole).
        weight_shape: Shape of the weights.
        weight_bits: Width of the weight codes; None if the layer stays in float.
        act_bits: Width of its input's codes; None if the layer stays in float.
        macs: Multiply-accumulates for the traced input (all its examples).
        weight_path: Path of the parameter itself.
        range_key: Key of its input's range in the state; None if the layer stays in float or the
            range is dynamic.
        float_reason: Why the layer stays in float; None if it does not.
        settings: Its settings; None if it stays in float.
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
    settings: Settings | None = None

    def covered(self, ranges: Mapping[Key, Any]) -> tuple[float, float] | None:
        """Return the smallest and largest real value of its input's codes; None without a range."""
        if self.range_key is None or self.settings is None:
            return None
        settings = dataclasses.replace(self.settings, act_bits=self.act_bits)
        return QuantizedTensor(self.range_key, settings).covered(ranges.get(self.range_key))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A program and what to quantize in it.

    Attributes:
        program: The traced computation.
        level: What each variable depends on.
        layers: Quantized products and tables of embeddings, by node.
        tensors: Tensors to quantize, by place.
        dropouts: Every dropout, by the node that ends it.
        step_sizes: Shapes of the weights' learned step sizes, by key in the state.
        table: Every product, quantized or not, in order.
    """

    program: Program
    level: list[int]
    layers: dict[TracedNode, Layer | Lookup | Pair]
    tensors: dict[Place, QuantizedTensor]
    dropouts: Mapping[TracedNode, Dropout]
    step_sizes: dict[Key, tuple[int, ...]]
    table: tuple[LayerInfo, ...]

    def empty_state(self) -> dict[Key, Any]:
        """Return all ranges and learned step sizes before the first batch."""
        state = {key: tensor.empty() for key, tensor in self.by_key().items()}
        for key, shape in self.step_sizes.items():
            state[key] = {"step": jnp.ones(shape, jnp.float32), "count": jnp.zeros((), jnp.int32)}
        return state

    def by_key(self) -> dict[Key, QuantizedTensor]:
        """Return all tensors to quantize by the key of their range."""
        return {tensor.key: tensor for tensor in self.tensors.values()}

    def check_rules(self, recipe: Recipe) -> None:
        """Raise RecipeError if a rule of the recipe decides about no layer."""
        by_rule = (None, LEFT_BY_RECIPE, VARIABLE_WEIGHTS)
        able = [i for i in self.table if i.float_reason in by_rule]
        recipe.check_rules([(info.path, info.kind) for info in able])
