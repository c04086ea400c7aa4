"""What is to be quantized in a traced computation: weights, tensors, products, and their names.

Three findings, in this order. (a) What a variable depends on: parameters only, statistics of the
batch, or the data; a product of data with something that depends on parameters only is a layer,
named by the parameter. (b) The tensor that a layer reads, followed back through reshaping to its
source: quantized once, there, so every other reader sees the quantized values. (c) Behind those
tensors, residual additions seen through batch norm, and the inputs of average pooling: these need
a range too if the network is to run on integers throughout.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxqat.quant.derive import MOVES, is_channelwise, is_number
from jaxqat.quant.ops import QuantizedProduct
from jaxqat.quant.plan import (
    DATA,
    LEFT_BY_RECIPE,
    NO_WEIGHTS,
    PARAMETERS,
    STATISTICS,
    Key,
    Layer,
    LayerInfo,
    Plan,
    Site,
)
from jaxqat.quant.products import Convolution, Dot, Product
from jaxqat.quant.program import (
    PRODUCTS,
    Atom,
    Constant,
    Node,
    Program,
    inner_jaxprs,
    products_inside,
)
from jaxqat.quant.recipe import Recipe

_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
_AFFINE = ("add", "sub", "mul", "div", "neg")
_OTHER_PRODUCTS = ("ragged_dot", "ragged_dot_general", "scaled_dot", "scaled_matmul")
_SOURCE_MOVES = MOVES - {"reduce_window_max"} | {"pad"}


def make_plan(
    program: Program,
    paths: Sequence[Key | None],
    is_data: Sequence[bool],
    recipe: Recipe,
) -> Plan:
    """Decides what to quantize.

    Args:
        program: The traced computation.
        paths: For each flat argument, the path of the parameter it is, or None.
        is_data: For each flat argument, whether it varies from call to call.
        recipe: Bits and exceptions.

    """
    level, names = _dependence(program, paths, is_data)
    planner = _Planner(program, level, names, recipe)
    for node in program.nodes:
        planner.visit(node)
    planner.add_sites_behind()
    return Plan(program, level, planner.layers, planner.sites, planner.finished_table())


def _dependence(program, paths, is_data) -> tuple[list[int], dict[int, Key]]:
    level = [PARAMETERS] * len(program.avals)
    names: dict[int, Key] = {}
    for number, path, data in zip(program.inputs, paths, is_data, strict=True):
        level[number] = DATA if data else PARAMETERS
        if path is not None:
            names[number] = path
    for node in program.nodes:
        reads = [a for a in node.inputs if isinstance(a, int)]
        depends = max((level[a] for a in reads), default=PARAMETERS)
        if node.name in _REDUCTIONS and _is_statistic(node, program):
            depends = min(depends, STATISTICS)
        name = next((names[a] for a in reads if a in names), None)
        for number in node.outputs:
            level[number] = depends
            if depends == PARAMETERS and name is not None:
                names[number] = name
    return level, names


def _is_statistic(node: Node, program: Program) -> bool:
    """Whether a reduction leaves at most one axis, and that not the first, as batch norm's do."""
    axes = node.equation.params["axes"]
    return 0 in axes and len(axes) >= len(program.aval(node.inputs[0]).shape) - 1


class _Planner:
    """Collects layers and sites over one pass of the program."""

    def __init__(self, program: Program, level: list[int], names: dict[int, Key], recipe: Recipe):
        self.program, self.level, self.names, self.recipe = program, level, names, recipe
        self.layers: dict[Node, Layer] = {}
        self.sites: dict[int, Site] = {}
        self.table: list[LayerInfo] = []
        self._keys: dict[Key, int] = {}
        self._sources: dict[int, int] = {}  # Row of the table -> the tensor the layer reads.

    def visit(self, node: Node) -> None:
        """Takes a node into the table, and plans it if it is a layer to quantize."""
        if node.name in _OTHER_PRODUCTS:
            self._leave_inner(node, f"'{node.name}' has no integer form here")
        if node.name not in PRODUCTS:
            for jaxpr in inner_jaxprs(node.equation):
                if count := products_inside(jaxpr):
                    reason = f"{count} product(s) inside a '{node.name}', which is not taken apart"
                    self._leave_inner(node, reason)
            return
        depends = [PARAMETERS if isinstance(a, Constant) else self.level[a] for a in node.inputs]
        kind = "conv" if node.name == "conv_general_dilated" else "dense"
        if min(depends) != PARAMETERS or max(depends) == PARAMETERS:
            constant = max(depends) == PARAMETERS
            reason = "both operands depend on parameters only" if constant else NO_WEIGHTS
            return self._leave(node, kind, 1, (f"{node.name}{len(self.table)}",), reason)
        side = depends.index(PARAMETERS)
        weights = node.inputs[side]
        name = self.names.get(weights) if isinstance(weights, int) else None
        name = name or (f"{node.name}{len(self.table)}",)
        weight_bits, act_bits = self.recipe.bits("/".join(_module(name)), kind)
        reason = self._why_not(node, kind, side, weight_bits)
        if reason is not None or weight_bits is None or act_bits is None:
            return self._leave(node, kind, side, name, reason)
        self._plan(node, side, name, weight_bits, act_bits)

    def _why_not(self, node: Node, kind: str, side: int, bits: int | None) -> str | None:
        data, weights = (
            self.program.aval(node.inputs[1 - side]),
            self.program.aval(node.inputs[side]),
        )
        if bits is None:
            return LEFT_BY_RECIPE
        if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (data, weights)):
            return f"its operands are {data.dtype.name} and {weights.dtype.name}, not real numbers"
        if kind == "conv" and side == 0:
            return "the weights are the left operand of a convolution"
        if kind == "conv" and node.equation.params["batch_group_count"] != 1:
            return "its convolution groups the batch (batch_group_count is not 1)"
        return None

    def _leave(self, node: Node, kind: str, side: int, name: Key, reason: str | None) -> None:
        side = 1 if kind == "conv" else side  # A convolution counts by its right operand.
        shape, out = self._shapes(node, side)
        macs = self._product(node, kind, side).macs(shape, out)
        path = "/".join(_module(name))
        info = LayerInfo(path, kind, shape, None, None, macs, name, None, reason)
        self.table.append(info)

    def _leave_inner(self, node: Node, reason: str) -> None:
        name = (f"{node.name}{len(self.table)}",)
        self.table.append(LayerInfo(name[0], "any", (), None, None, 0, name, None, reason))

    def _plan(self, node: Node, side: int, name: Key, weight_bits: int, act_bits: int) -> None:
        kind = "conv" if node.name == "conv_general_dilated" else "dense"
        product = self._product(node, kind, side)
        shape, out = self._shapes(node, side)
        per_tensor = self.recipe.weight_granularity == "per_tensor"
        axes = tuple(range(len(shape))) if per_tensor else product.channel_axes
        dtype = self.program.avals[node.outputs[0]].dtype
        data = node.inputs[1 - side]
        assert isinstance(data, int)  # A constant would depend on parameters only.
        source = self._source(data)
        site = self.sites.get(source)
        if site is None:
            self.sites[source] = Site(self._key((*_module(name), "input")), act_bits)
        elif site.bits < act_bits:
            self.sites[source] = dataclasses.replace(site, bits=act_bits)
        how = QuantizedProduct(product, weight_bits, axes, dtype)
        path, macs = "/".join(_module(name)), product.macs(shape, out)
        self.layers[node] = Layer(path, how, data, self._unconverted(node.inputs[side]))
        self._sources[len(self.table)] = source
        self.table.append(
            LayerInfo(path, kind, shape, weight_bits, act_bits, macs, name, None, None)
        )

    def _product(self, node: Node, kind: str, side: int) -> Product:
        primitive, params = node.equation.primitive, node.equation.params
        rank = len(self.program.avals[node.outputs[0]].shape)
        if kind == "conv":
            return Convolution(primitive, params, rank)
        return Dot(primitive, params, rank, side)

    def _shapes(self, node: Node, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        weights, output = self.program.aval(node.inputs[side]), self.program.avals[node.outputs[0]]
        return tuple(weights.shape), tuple(output.shape)

    def _unconverted(self, weights: Atom) -> Atom:
        """The weights before a cast to the compute type: codes come from the parameter itself."""
        node = self.program.made_by.get(weights) if isinstance(weights, int) else None
        if node is not None and node.name == "convert_element_type":
            before = node.inputs[0]
            return self._unconverted(before) if _is_float(self.program.aval(before)) else weights
        return weights

    def _source(self, number: int) -> int:
        """The tensor that reshaping, casting and zero padding made this one from."""
        node = self.program.made_by.get(number)
        if node is None or node.name not in _SOURCE_MOVES:
            return number
        if node.name == "pad" and not (
            isinstance(node.inputs[1], Constant) and is_number(node.inputs[1].value, 0.0)
        ):
            return number
        before = node.inputs[0]
        if not isinstance(before, int) or not _is_float(self.program.avals[before]):
            return number
        return self._source(before)

    def _key(self, key: Key) -> Key:
        """A key of its own for each tensor: a weight used twice meets two tensors."""
        uses = self._keys[key] = self._keys.get(key, 0) + 1
        return key if uses == 1 else (*key[:-1], f"{key[-1]}{uses}")

    def finished_table(self) -> tuple[LayerInfo, ...]:
        """The table, with the keys and widths that the tensors have in the end."""
        table = list(self.table)
        for row, source in self._sources.items():
            site = self.sites.get(source)
            if site is None:
                site = self.sites[self._quantized_before(source) or source]
            table[row] = dataclasses.replace(table[row], range_key=site.key, act_bits=site.bits)
        return tuple(table)

    def add_sites_behind(self) -> None:
        """Finding (c), and maxima of windows: of a quantized tensor they are quantized already."""
        for number in sorted(self.sites, reverse=True):
            before = self._quantized_before(number)
            if before is not None:
                bits = max(self.sites.pop(number).bits, self.sites[before].bits)
                self.sites[before] = dataclasses.replace(self.sites[before], bits=bits)
        waiting = sorted(self.sites)
        while waiting:
            number = waiting.pop()
            found = self._behind(number)
            if found is not None and found[0] not in self.sites:
                behind, label = found
                site = self.sites[number]
                self.sites[behind] = Site(self._key((*site.key[:-1], label)), site.bits)
                waiting.append(behind)

    def _quantized_before(self, number: int) -> int | None:
        """The quantized tensor that this one is maxima of windows of, if it is."""
        pooled = False
        while (node := self.program.made_by.get(number)) is not None:
            pooled |= node.name == "reduce_window_max"
            before = node.inputs[0]
            if node.name not in _SOURCE_MOVES | {"reduce_window_max"} or not isinstance(
                before, int
            ):
                return None
            number = before
            if number in self.sites:
                return number if pooled else None
        return None

    def _behind(self, number: int) -> tuple[int, str] | None:
        affine = False
        while (node := self.program.made_by.get(number)) is not None:
            big = [a for a in node.inputs if isinstance(a, int) and not self._small(a, node)]
            if node.name == "select_n":  # Dropout: a mask, the tensor, and zeros.
                big = [a for a in big if self.level[a] == DATA and _is_float(self.program.avals[a])]
            if node.name in ("reduce_sum", "reduce_window_sum"):
                if self.level[number] != DATA or not isinstance(node.inputs[0], int):
                    return None
                return self._source(node.inputs[0]), "pool"
            if len(big) == 2 and node.name == "add":
                return (number, "add") if affine else None
            passes = node.name in _SOURCE_MOVES or node.name in ("max", "min", "reduce_window_max")
            passes = passes or node.name in (*_AFFINE, "select_n") or _is_clamp_call(node)
            if not passes or len(big) != 1:
                return None
            affine |= node.name in _AFFINE
            number = big[0]
            if number in self.sites:
                return None
        return None

    def _small(self, number: int, node: Node) -> bool:
        """Whether an operand is coefficients: one per channel, not depending on single examples."""
        shape, out = self.program.avals[number].shape, self.program.avals[node.outputs[0]].shape
        return self.level[number] < DATA and is_channelwise(shape, out)


def _module(name: Key) -> Key:
    """Path of the module that holds a parameter; a parameter at the top is its own module."""
    return name[:-1] if len(name) > 1 else name


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _is_clamp_call(node: Node) -> bool:
    """Whether a call that is kept whole only clips, as `jax.nn.relu` and `relu6` do."""
    jaxprs = list(inner_jaxprs(node.equation))

    def clips(jaxpr: Any) -> bool:
        return all(
            e.primitive.name in ("max", "min") or any(map(clips, inner_jaxprs(e)))
            for e in jaxpr.eqns
        )

    return node.name in ("custom_jvp_call", "jit") and any(map(clips, jaxprs))
