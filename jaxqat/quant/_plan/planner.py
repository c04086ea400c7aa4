"""Decides what to quantize in a traced program, and names it.

The plan is made in three steps. First `dependence` finds what each variable depends on: parameters
only, statistics of the batch, or the data. A product of data with something that depends on
parameters only is a layer, named by the parameter. Then one pass over the program takes each layer
into the plan by its settings, or notes why it stays in float; the tensor that a layer reads is
followed back to its source and quantized there (`tensors`). Last, the residual additions and
average pools before those tensors get ranges too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxqat.errors import RecipeError
from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._numerics.multiply import ProductQuantizer
from jaxqat.quant._numerics.weights import WeightQuantizer
from jaxqat.quant._plan.dependence import dependence, is_float
from jaxqat.quant._plan.dropout import find_dropouts
from jaxqat.quant._plan.origins import Origins
from jaxqat.quant._plan.plan import (
    CONSTANT_WEIGHTS,
    LEFT_BY_RECIPE,
    NO_WEIGHTS,
    PARAMETERS,
    VARIABLE_WEIGHTS,
    Layer,
    LayerInfo,
    Lookup,
    Pair,
    Plan,
)
from jaxqat.quant._plan.products import Operands, with_scales
from jaxqat.quant._plan.tensors import TensorPlanner
from jaxqat.quant._trace.arguments import ArgumentKind, Key
from jaxqat.quant._trace.program import Atom, Program, TracedNode, inner_jaxprs, products_inside
from jaxqat.quant.recipe import Recipe, Settings


def make_plan(
    program: Program,
    paths: Sequence[Key | None],
    kinds: Sequence[ArgumentKind],
    recipe: Recipe,
) -> Plan:
    """Decide what to quantize.

    Args:
        program: The traced computation.
        paths: For each flat argument, the path of the parameter or variable it is; None for data.
        kinds: For each flat argument, what it is.
        recipe: Bits and exceptions.

    Raises:
        RecipeError: Two layers that read the same tensor disagree about it, or a setting does not
            fit its layer.
    """
    level, names = dependence(program, paths, kinds)
    planner = _Planner(program, level, names, recipe)
    for node in program.nodes:
        planner.visit(node)
    planner.tensors.finish()
    table = planner.finished_table()
    tensors, dropouts = planner.tensors.tensors, planner.dropouts
    return Plan(program, level, planner.layers, tensors, dropouts, planner.step_sizes, table)


class _Planner:
    """Collects layers and the table over one pass of the program.

    Attributes:
        layers: Quantized products and look-ups, by node.
        tensors: Tensors to quantize.
        dropouts: Every dropout, by the node that ends it.
        step_sizes: Shapes of learned step sizes of weights, by key in the state.
        table: Every product.
    """

    def __init__(self, program: Program, level: list[int], names: dict[int, Key], recipe: Recipe):
        self.program, self.recipe = program, recipe
        self.layers: dict[TracedNode, Layer | Lookup | Pair] = {}
        self.step_sizes: dict[Key, tuple[int, ...]] = {}
        self.table: list[LayerInfo] = []
        self._operands = Operands(program, level, names)
        self.dropouts = find_dropouts(program, level)
        self._origins = Origins(program, level, self.dropouts)
        self.tensors = TensorPlanner(self._origins, self.layers)
        self._step_size_keys: dict[tuple[Any, Any], Key] = {}
        self._sources: dict[int, int] = {}  # Source of the tensor that a layer reads, by index.
        # Iterations of a loop share the key of a range and the index in the table.
        self._repeats: dict[Any, tuple[Key, int]] = {}
        weighted = [node for node in program.nodes if self._has_weights(node)]
        self._edges = {self._identity(node) for node in (*weighted[:1], *weighted[-1:])}

    def visit(self, node: TracedNode) -> None:
        """Take a node into the table if it is a product, and plan it if it is quantized."""
        primitive = primitive_of(node.name)
        if primitive.is_product:
            return self._visit_product(node)
        kind = primitive.kind
        if kind is Kind.LOOKUP:
            return self._visit_lookup(node)
        if kind is Kind.OTHER_PRODUCT:
            self._leave_inner(node, f"'{node.name}' has no integer form here")
        for jaxpr in inner_jaxprs(node.equation):
            if count := products_inside(jaxpr):
                reason = f"{count} product(s) inside a '{node.name}', which stays whole"
                self._leave_inner(node, reason)

    def _visit_product(self, node: TracedNode) -> None:
        kind = "conv" if primitive_of(node.name).kind is Kind.CONV else "dense"
        side = self._operands.weight_side(node)
        if side is None:
            return self._visit_pair(node, kind)
        name = self._operands.name(node.inputs[side])
        assert name is not None  # Whatever depends on variables of the model has a name.
        path = "/".join(_module(name))
        settings = self._settings(path, kind, node)
        reason = self._operands.float_reason(node, kind, side, settings)
        by_rule = any(rule.matches(path, kind) for rule in self.recipe.rules)
        if not (self._operands.has_parameters(node, side) or by_rule):
            reason = VARIABLE_WEIGHTS
        if reason is not None or settings is None:
            return self._leave(node, kind, side, name, reason)
        self._plan_layer(node, kind, side, name, settings)

    def _settings(self, path: str, kind: str, node: TracedNode) -> Settings | None:
        return self.recipe.settings(path, kind, at_edge=self._identity(node) in self._edges)

    def _has_weights(self, node: TracedNode) -> bool:
        primitive = primitive_of(node.name)
        if primitive.kind is Kind.LOOKUP:
            return self._operands.table_name(node) is not None
        side = self._operands.weight_side(node) if primitive.is_product else None
        return side is not None and self._operands.has_parameters(node, side)

    def _identity(self, node: TracedNode) -> Any:
        """Return what identifies a layer: iterations of a loop that share weights are one layer."""
        if not node.loop:
            return node
        names = (self._operands.name(a) for a in node.inputs)
        return (node.loop, id(node.equation), next((n for n in names if n), None))

    def _visit_lookup(self, node: TracedNode) -> None:
        name = self._operands.table_name(node)
        if name is None:
            return
        table, path = node.inputs[0], "/".join(_module(name))
        aval = self.program.aval(table)
        settings = self._settings(path, "embed", node)
        shape = tuple(aval.shape)
        if settings is None:
            info = LayerInfo(path, "embed", shape, None, None, 0, name, None, LEFT_BY_RECIPE)
            return self.table.append(info)
        if settings.weight_granularity == "per_group":
            raise RecipeError(
                f"quant.weight_granularity 'per_group' is for dense layers, and {path} is a table "
                "of embeddings; set it in a rule that matches dense layers only."
            )
        axes = (0, 1) if settings.weight_granularity == "per_tensor" else (1,)
        quantizer = WeightQuantizer(settings, axes, aval.dtype)
        key = self._step_size_key(node, table, name, settings, axes)
        self.layers[node] = Lookup(len(self.table), path, quantizer, table, key)
        bits = settings.weight_bits
        self.table.append(
            LayerInfo(path, "embed", shape, bits, None, 0, name, None, None, settings)
        )

    def _visit_pair(self, node: TracedNode, kind: str) -> None:
        """Take in a product without weights; a rule of kind 'attention' may quantize it."""
        path = "/".join(p for p in (node.scope, f"{node.name}{len(self.table)}") if p)
        constant = self._operands.constant_side(node)
        if constant is not None:
            return self._leave(node, kind, constant, (path, ""), CONSTANT_WEIGHTS)
        if max(self._operands.levels(node)) <= PARAMETERS:
            reason = "both operands depend on parameters only"
            return self._leave(node, kind, 1, (path, ""), reason)
        settings = None if kind == "conv" else self.recipe.settings(path, "attention")
        avals = [self.program.aval(a) for a in node.inputs]
        if settings is None and any(r.matches(path, "attention") for r in self.recipe.rules):
            return self._leave(node, "attention", 1, (path, ""), LEFT_BY_RECIPE)
        if settings is None or not all(map(is_float, avals)):
            return self._leave(node, kind, 1, (path, ""), NO_WEIGHTS)
        if settings.act_range == "dynamic":
            raise RecipeError(
                f"quant.rules: {path} is a product of two activations (kind 'attention'), which "
                "cannot have act_range 'dynamic'."
            )
        left, right = node.inputs
        assert isinstance(left, int) and isinstance(right, int)
        dot: Any = self._operands.product(node, kind, 1)
        shape, out = self._operands.shapes(node, 1)
        self.tensors.add(left, (path, "left"), settings, path)
        self.tensors.add(right, (path, "right"), settings, path)
        dtype = self.program.avals[node.outputs[0]].dtype
        self.layers[node] = Pair(len(self.table), path, dot, left, right, dtype)
        self._sources[len(self.table)] = self._origins.source(left)
        bits, macs = settings.act_bits, dot.macs(shape, out)
        self.table.append(
            LayerInfo(path, "attention", shape, bits, bits, macs, (path,), None, None, settings)
        )

    def _leave(self, node: TracedNode, kind: str, side: int, name: Key, reason: str | None) -> None:
        side = 1 if kind == "conv" else side  # A convolution counts by its right operand.
        shape, out = self._operands.shapes(node, side)
        macs = self._operands.product(node, kind, side).macs(shape, out)
        path = "/".join(_module(name))
        self.table.append(LayerInfo(path, kind, shape, None, None, macs, name, None, reason))

    def _leave_inner(self, node: TracedNode, reason: str) -> None:
        name = (f"{node.name}{len(self.table)}",)
        self.table.append(LayerInfo(name[0], "any", (), None, None, 0, name, None, reason))

    def _plan_layer(
        self, node: TracedNode, kind: str, side: int, name: Key, settings: Settings
    ) -> None:
        product = self._operands.product(node, kind, side)
        shape, out = self._operands.shapes(node, side)
        path, macs = "/".join(_module(name)), product.macs(shape, out)
        product, axes = with_scales(product, shape, settings, path)
        data = node.inputs[1 - side]
        assert isinstance(data, int)  # A constant would depend on parameters only.
        dynamic = settings.act_range == "dynamic"
        identity = self._identity(node)
        known, index = self._repeats.get(identity, (None, len(self.table)))
        key = known or (*_module(name), "input")
        if dynamic:
            self.tensors.add_dynamic(data, path)
        else:
            known = self.tensors.add(data, key, settings, path, is_new=not known)
        if node.loop:
            self._repeats[identity] = (known or (), index)
        weights = self._origins.unconverted(node.inputs[side])
        step_size_key = self._step_size_key(node, weights, name, settings, axes)
        dtype = self.program.avals[node.outputs[0]].dtype
        quantizer = ProductQuantizer(settings, axes, dtype, product)
        self.layers[node] = Layer(index, path, quantizer, data, weights, step_size_key, dynamic)
        if index < len(self.table):
            before = self.table[index]
            self.table[index] = dataclasses.replace(before, macs=before.macs + macs)
            return
        if not dynamic:
            self._sources[index] = self._origins.source(data)
        bits = (settings.weight_bits, settings.act_bits)
        self.table.append(LayerInfo(path, kind, shape, *bits, macs, name, None, None, settings))

    def _step_size_key(
        self, node: TracedNode, weights: Atom, name: Key, settings: Settings, axes: tuple[int, ...]
    ) -> Key | None:
        """Return the key of the weights' learned step sizes; layers that share weights share it."""
        if settings.weight_range != "lsq":
            return None
        same = (self._identity(node) if node.loop else weights, axes)
        if same not in self._step_size_keys:
            # The parameter names it; a parameter at the top is its own module.
            key = name if len(name) > 1 else (*name, "weights")
            self._step_size_keys[same] = self.tensors.unique_key(key)
        key, shape = self._step_size_keys[same], self.program.aval(weights).shape
        self.step_sizes[key] = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
        return key

    def finished_table(self) -> tuple[LayerInfo, ...]:
        """Return the table with the final keys and widths of the tensors that layers read."""
        table = list(self.table)
        for index, source in self._sources.items():
            tensor = self.tensors.read_at(source)
            table[index] = dataclasses.replace(
                table[index], range_key=tensor.key, act_bits=tensor.bits
            )
        return tuple(table)


def _module(name: Key) -> Key:
    """Return the path of the module of a parameter; one at the top is its own module."""
    return name[:-1] if len(name) > 1 else name
