"""Facts about the products in a trace: kind, operands, shapes, and groups of inputs."""

import dataclasses

from jaxqat.errors import RecipeError
from jaxqat.quant._numerics.grouped import GroupedDot
from jaxqat.quant._numerics.products import AnyProduct, Convolution, Dot
from jaxqat.quant._plan.dependence import is_float
from jaxqat.quant._plan.plan import CONSTANTS, DATA, LEFT_BY_RECIPE, PARAMETERS
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import Atom, Constant, Program, TracedNode
from jaxqat.quant.recipe import Settings

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """Answers questions about what products and look-ups read.

    Attributes:
        program: The traced computation.
        level: What each variable depends on.
        names: Path of the parameter, or else of the variable of the model, that names a variable.
    """

    program: Program
    level: list[int]
    names: dict[int, Key]

    def levels(self, node: TracedNode) -> list[int]:
        """Return what each operand depends on."""
        return [CONSTANTS if isinstance(a, Constant) else self.level[a] for a in node.inputs]

    def weight_side(self, node: TracedNode) -> int | None:
        """Return which operand of a product depends on variables of the model, if just one does.

        It may depend on parameters too, but not on data.
        """
        side = self._fixed_side(node)
        return side if side is not None and self.levels(node)[side] > CONSTANTS else None

    def constant_side(self, node: TracedNode) -> int | None:
        """Return which operand of a product is a constant, as interpolation matrices are."""
        side = self._fixed_side(node)
        return side if side is not None and self.levels(node)[side] == CONSTANTS else None

    def _fixed_side(self, node: TracedNode) -> int | None:
        levels = self.levels(node)
        return levels.index(min(levels)) if min(levels) <= PARAMETERS < max(levels) else None

    def has_parameters(self, node: TracedNode, side: int) -> bool:
        """Return whether the weights of a product, on one side, depend on parameters."""
        return self.levels(node)[side] == PARAMETERS

    def name(self, atom: Atom) -> Key | None:
        """Return the path of the parameter or variable of the model that names an operand."""
        return self.names.get(atom) if isinstance(atom, int) else None

    def table_name(self, node: TracedNode) -> Key | None:
        """Return the path of the embeddings that a look-up reads; None if it is no embedding."""
        table, levels = node.inputs[0], self.levels(node)
        aval = self.program.aval(table)
        has_rows = is_float(aval) and len(aval.shape) == 2
        if not has_rows or levels[0] != PARAMETERS or max(levels[1:]) != DATA:
            return None
        return self.name(table)

    def shapes(self, node: TracedNode, side: int) -> tuple[Shape, Shape]:
        """Return the shapes of the operand on one side, and of the result."""
        operand, output = self.program.aval(node.inputs[side]), self.program.avals[node.outputs[0]]
        return tuple(operand.shape), tuple(output.shape)

    def product(self, node: TracedNode, kind: str, side: int) -> Convolution | Dot:
        """Return the product of a node whose weights are on one side."""
        primitive, params = node.equation.primitive, node.equation.params
        rank = len(self.program.avals[node.outputs[0]].shape)
        if kind == "conv":
            return Convolution(primitive, params, rank)
        return Dot(primitive, params, rank, side)

    def float_reason(
        self, node: TracedNode, kind: str, side: int, settings: Settings | None
    ) -> str | None:
        """Return why a product with weights stays in float; None if it does not."""
        data, weights = (self.program.aval(node.inputs[s]) for s in (1 - side, side))
        if settings is None:
            return LEFT_BY_RECIPE
        if not all(map(is_float, (data, weights))):
            return f"its operands are {data.dtype.name} and {weights.dtype.name}, not real numbers"
        if kind == "conv" and side == 0:
            return "the weights are the left operand of a convolution"
        if kind == "conv" and node.equation.params["batch_group_count"] != 1:
            return "its convolution groups the batch (batch_group_count is not 1)"
        return None


def with_scales(
    product: AnyProduct, shape: Shape, settings: Settings, path: str
) -> tuple[AnyProduct, tuple[int, ...]]:
    """Return a product for the granularity of its weights, and the axes that share one scale.

    Args:
        product: The product.
        shape: Shape of its weights.
        settings: Of the layer.
        path: Of the layer.

    Raises:
        RecipeError: The layer cannot have a scale per group of inputs.
    """
    if settings.weight_granularity == "per_tensor":
        return product, tuple(range(len(shape)))
    if settings.weight_granularity == "per_group":
        grouped = _grouped(product, shape, settings.group_size, path)
        return grouped, grouped.scale_axes
    return product, product.channel_axes


def _grouped(product: AnyProduct, shape: Shape, size: int, path: str) -> GroupedDot:
    setting = "quant.weight_granularity 'per_group'"
    if not isinstance(product, Dot) or len(product.channel_axes) != 1:
        raise RecipeError(
            f"{setting} is for dense layers that sum over one axis, and {path} is none; set it in "
            "a rule that matches dense layers only."
        )
    inputs = shape[product.channel_axes[0]]
    if inputs % size:
        raise RecipeError(
            f"{setting}: quant.group_size {size} does not divide the {inputs} inputs of {path}."
        )
    values = {f.name: getattr(product, f.name) for f in dataclasses.fields(product)}
    return GroupedDot(**values, group_size=size)
