"""What is to be quantized in a traced computation, as plain data; `trace` finds it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxqat.quant._numerics.grids import Grid, grid, with_scale
from jaxqat.quant._numerics.multiply import QuantizedProduct
from jaxqat.quant._numerics.products import Dot
from jaxqat.quant._numerics.ranges import empty_range
from jaxqat.quant._numerics.weights import QuantizedWeights
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import Atom, Node, Program
from jaxqat.quant.recipe import Recipe, Settings

# What a value depends on, in this order: it takes the largest of what it is made of.
PARAMETERS, STATISTICS, DATA = 0, 1, 2

# The leaf of a tensor's state that gradients train, by how.
LEARNED = {"lsq": "step", "pact": "bound"}

LEFT_BY_RECIPE = "the recipe leaves it in float"
NO_WEIGHTS = "both operands depend on the data"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized product: its module's path, which operand is what, how it is multiplied.

    Attributes:
        row: Of the plan's table.
        path: Of the module.
        how: The product and the quantization of its weights.
        data: The activations that it reads.
        weights: The weights.
        step_key: Where the state holds the weights' learned step sizes, if they have any.
        dynamic: Whether the activations' range is that of each example, found when it is run.
    """

    row: int
    path: str
    how: QuantizedProduct
    data: int
    weights: Atom
    step_key: Key | None = None
    dynamic: bool = False


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A table of embeddings whose rows are quantized: what is looked up are their real values."""

    row: int
    path: str
    how: QuantizedWeights
    weights: Atom
    step_key: Key | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """A product of two quantized activations, as attention has it."""

    row: int
    path: str
    dot: Dot
    left: int
    right: int
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Site:
    """A tensor to quantize: where its range is kept, and how wide and of which kind it is."""

    key: Key
    settings: Settings

    @property
    def bits(self) -> int:
        """Width of the codes."""
        assert self.settings.act_bits is not None
        return self.settings.act_bits

    @property
    def learned(self) -> Literal["lsq", "pact"] | None:
        """How its scale is learned, if it is."""
        how = self.settings.act_range
        return how if how in ("lsq", "pact") else None  # pyright: ignore[reportReturnType]

    @property
    def leaf(self) -> str | None:
        """What of its state gradients train, if anything."""
        return LEARNED.get(self.settings.act_range)

    def grid(self, low: Any, high: Any, learned: Any = None) -> Grid:
        """The grid of a range, with a learned step size or bound if there is one."""
        symmetric = self.settings.activations == "symmetric"
        found = grid(low, high, bits=self.bits, symmetric=symmetric)
        if learned is None:
            return found
        return with_scale(found, learned if self.leaf == "step" else learned / found.top)

    def covered(self, state: Any) -> tuple[float, float] | None:
        """Smallest and largest real value that codes stand for; None if nothing was seen yet."""
        if state is None or int(state["count"]) == 0:
            return None
        if self.leaf is None:
            return float(state["min"]), float(state["max"])
        found = self.grid(state["min"], state["max"], state[self.leaf])
        low, high = (found.scale * (code - found.zero) for code in (found.low, found.high))
        return float(low), float(high)

    def empty(self) -> Any:
        """Its state before anything was seen."""
        leaf = self.leaf
        return {**empty_range(), **({leaf: jnp.ones((), jnp.float32)} if leaf else {})}


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One product of the model, and what quantization makes of it.

    Attributes:
        path: Path of its parameter's module, such as 'stage1/block0/conv1'.
        kind: 'conv', 'dense', 'embed' (a table of embeddings), 'attention' (a product of two
            activations) or 'any' (products inside of something else).
        weight_shape: Shape of the weights.
        weight_bits: Width of the weight codes; None if the layer stays in float.
        act_bits: Width of its input's codes; None if the layer stays in float.
        macs: Multiply-accumulates for the traced input (all its examples).
        weight_path: Path of the parameter itself.
        range_key: Where the state holds the range of its input; None if it has none: it stays in
            float, or its range is dynamic.
        float_reason: Why the layer stays in float; None if it does not.
        settings: How it is quantized; None if it stays in float.
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
        """Smallest and largest real value of its input's codes; None without a range."""
        if self.range_key is None or self.settings is None:
            return None
        settings = dataclasses.replace(self.settings, act_bits=self.act_bits)
        return Site(self.range_key, settings).covered(ranges.get(self.range_key))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A program and what to quantize in it.

    Attributes:
        program: The traced computation.
        level: What each variable depends on.
        layers: Quantized products, and tables of embeddings, by node.
        sites: Tensors to quantize by variable.
        steps: Shapes of learned step sizes of weights, by where the state holds them.
        table: Every product, quantized or not, in order.
    """

    program: Program
    level: list[int]
    layers: dict[Node, Layer | Lookup | Pair]
    sites: dict[int, Site]
    steps: dict[Key, tuple[int, ...]]
    table: tuple[LayerInfo, ...]

    def empty_state(self) -> dict[Key, Any]:
        """What is kept of activations and of learned step sizes, before anything was seen."""
        state = {site.key: site.empty() for site in self.sites.values()}
        for key, shape in self.steps.items():
            state[key] = {"step": jnp.ones(shape, jnp.float32), "count": jnp.zeros((), jnp.int32)}
        return state

    def check_rules(self, recipe: Recipe) -> None:
        """Refuses a rule of the recipe that decides about no layer (`Recipe.check_rules`)."""
        able = [i for i in self.table if i.float_reason in (None, LEFT_BY_RECIPE)]
        recipe.check_rules([(info.path, info.kind) for info in able])
