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

from jaxqat.quant.grouped import GroupedDot
from jaxqat.quant.ops import QuantizedProduct, QuantizedWeights
from jaxqat.quant.origins import Origins, is_float
from jaxqat.quant.plan import (
    DATA,
    LEFT_BY_RECIPE,
    NO_WEIGHTS,
    PARAMETERS,
    STATISTICS,
    Key,
    Layer,
    LayerInfo,
    Lookup,
    Pair,
    Plan,
    Site,
)
from jaxqat.quant.products import Convolution, Dot, Product
from jaxqat.quant.program import (
    PRODUCTS,
    Constant,
    Node,
    Program,
    inner_jaxprs,
    products_inside,
)
from jaxqat.quant.recipe import Recipe, RecipeError, Settings

_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
_OTHER_PRODUCTS = ("ragged_dot", "ragged_dot_general", "scaled_dot", "scaled_matmul")
# What two readers of a tensor must agree on; of different widths the larger one serves both.
_SHARED = ("activations", "act_range", "percentile")


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

    Raises:
        RecipeError: Two layers that read the same tensor want it quantized in different ways.
    """
    level, names = _dependence(program, paths, is_data)
    planner = _Planner(program, level, names, recipe)
    for node in program.nodes:
        planner.visit(node)
    planner.add_sites_behind()
    table = planner.finished_table()
    return Plan(program, level, planner.layers, planner.sites, planner.steps, table)


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
        if any(a in program.carried and is_float(program.avals[a]) for a in node.outputs):
            depends = DATA  # From the second turn on, if not before.
        name = next((names[a] for a in reads if a in names), None)
        for number in node.outputs:
            level[number] = depends
            if depends == PARAMETERS and name is not None:
                turn = program.turns.get(number)
                names[number] = name if turn is None else (*name[:-1], str(turn), name[-1])
    return level, names


def _is_statistic(node: Node, program: Program) -> bool:
    """Whether a reduction leaves at most one axis, and that not the first, as batch norm's do."""
    axes = node.equation.params["axes"]
    return 0 in axes and len(axes) >= len(program.aval(node.inputs[0]).shape) - 1


class _Planner:
    """Collects layers and sites over one pass of the program."""

    def __init__(self, program: Program, level: list[int], names: dict[int, Key], recipe: Recipe):
        self.program, self.level, self.names, self.recipe = program, level, names, recipe
        self.layers: dict[Node, Layer | Lookup | Pair] = {}
        self.sites: dict[int, Site] = {}
        self.steps: dict[Key, tuple[int, ...]] = {}
        self.table: list[LayerInfo] = []
        self._origins = Origins(program, level)
        self._keys: dict[Key, int] = {}
        self._step_keys: dict[tuple[Key, Any], Key] = {}
        self._sources: dict[int, int] = {}  # Row of the table -> the tensor the layer reads.
        self._repeats: dict[Any, tuple[Key, int]] = {}  # Turns of a loop share range and row.
        weighted = [n for n in program.nodes if n.name in PRODUCTS and self._side(n) is not None]
        self._edges = {weighted[0], weighted[-1]} if weighted else set()

    def visit(self, node: Node) -> None:
        """Takes a node into the table, and plans it if it is a layer to quantize."""
        if node.name in _OTHER_PRODUCTS:
            self._leave_inner(node, f"'{node.name}' has no integer form here")
        if node.name == "gather":
            return self._visit_gather(node)
        if node.name not in PRODUCTS:
            for jaxpr in inner_jaxprs(node.equation):
                if count := products_inside(jaxpr):
                    reason = f"{count} product(s) inside a '{node.name}', which is not taken apart"
                    self._leave_inner(node, reason)
            return
        kind = "conv" if node.name == "conv_general_dilated" else "dense"
        side = self._side(node)
        if side is None:
            return self._visit_pair(node, kind)
        weights = node.inputs[side]
        name = self.names.get(weights) if isinstance(weights, int) else None
        name = name or (f"{node.name}{len(self.table)}",)
        edge = node in self._edges
        settings = self.recipe.settings("/".join(_module(name)), kind, at_edge=edge)
        reason = self._why_not(node, kind, side, settings)
        if reason is not None or settings is None:
            return self._leave(node, kind, side, name, reason)
        self._plan(node, kind, side, name, settings)

    def _depends(self, node: Node) -> list[int]:
        return [PARAMETERS if isinstance(a, Constant) else self.level[a] for a in node.inputs]

    def _side(self, node: Node) -> int | None:
        """Which operand of a product depends on parameters only, if one does."""
        depends = self._depends(node)
        one = min(depends) == PARAMETERS < max(depends)
        return depends.index(PARAMETERS) if one else None

    def _visit_gather(self, node: Node) -> None:
        """A look-up in a table of parameters, as embeddings are."""
        table, depends = node.inputs[0], self._depends(node)
        name = self.names.get(table) if isinstance(table, int) else None
        if name is None or depends[0] != PARAMETERS or max(depends[1:]) != DATA:
            return
        aval = self.program.aval(table)
        if not is_float(aval) or len(aval.shape) != 2:
            return
        path = "/".join(_module(name))
        settings = self.recipe.settings(path, "embed")
        if settings is None:
            row = LayerInfo(
                path, "embed", tuple(aval.shape), None, None, 0, name, None, LEFT_BY_RECIPE
            )
            return self.table.append(row)
        axes = (0, 1) if settings.weight_granularity == "per_tensor" else (1,)
        how = QuantizedWeights(settings, axes, aval.dtype)
        step_key = self._step_key(name, settings, axes, aval.shape)
        self.layers[node] = Lookup(len(self.table), path, how, table, step_key)
        self.table.append(
            LayerInfo(
                path, "embed", aval.shape, settings.weight_bits, None, 0, name, None, None, settings
            )
        )

    def _visit_pair(self, node: Node, kind: str) -> None:
        """A product without weights: quantized only if a rule of the kind 'attention' says so."""
        path = "/".join(p for p in (node.scope, f"{node.name}{len(self.table)}") if p)
        if max(self._depends(node)) == PARAMETERS:
            reason = "both operands depend on parameters only"
            return self._leave(node, kind, 1, (path, ""), reason)
        settings = None if kind == "conv" else self.recipe.settings(path, "attention")
        avals = [self.program.aval(a) for a in node.inputs]
        if settings is None or not all(map(is_float, avals)):
            return self._leave(node, kind, 1, (path, ""), NO_WEIGHTS)
        if settings.act_range == "dynamic":
            raise RecipeError(f"quant.rules: {path}: an 'attention' product has no dynamic ranges.")
        left, right = node.inputs
        assert isinstance(left, int) and isinstance(right, int)
        dot: Any = self._product(node, kind, 1)
        shape, out = self._shapes(node, 1)
        self._add_site(left, (path, "left"), settings, path)
        self._add_site(right, (path, "right"), settings, path)
        dtype = self.program.avals[node.outputs[0]].dtype
        self.layers[node] = Pair(len(self.table), path, dot, left, right, dtype)
        self._sources[len(self.table)] = self._origins.source(left)
        bits, macs = settings.act_bits, dot.macs(shape, out)
        self.table.append(
            LayerInfo(path, "attention", shape, bits, bits, macs, (path,), None, None, settings)
        )

    def _why_not(self, node: Node, kind: str, side: int, settings: Settings | None) -> str | None:
        data, weights = (
            self.program.aval(node.inputs[1 - side]),
            self.program.aval(node.inputs[side]),
        )
        if settings is None:
            return LEFT_BY_RECIPE
        if not all(map(is_float, (data, weights))):
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

    def _plan(self, node: Node, kind: str, side: int, name: Key, settings: Settings) -> None:
        product = self._product(node, kind, side)
        shape, out = self._shapes(node, side)
        path, macs = "/".join(_module(name)), product.macs(shape, out)
        axes = product.channel_axes
        if settings.weight_granularity == "per_tensor":
            axes = tuple(range(len(shape)))
        elif settings.weight_granularity == "per_group":
            product = _grouped(product, shape, settings.group_size, path)
            axes = product.scale_axes
        dtype = self.program.avals[node.outputs[0]].dtype
        data = node.inputs[1 - side]
        assert isinstance(data, int)  # A constant would depend on parameters only.
        dynamic = settings.act_range == "dynamic"
        turn = (node.loop, id(node.equation), name)
        key, row = self._repeats.get(turn, (None, len(self.table)))
        if not dynamic:
            key = self._add_site(data, key or (*_module(name), "input"), settings, path, key)
        if node.loop:
            self._repeats[turn] = (key or (), row)
        step_key = self._step_key(name, settings, axes, shape)
        how = QuantizedProduct(settings, axes, dtype, product)
        weights = self._origins.unconverted(node.inputs[side])
        self.layers[node] = Layer(row, path, how, data, weights, step_key, dynamic)
        if row < len(self.table):
            before = self.table[row]
            self.table[row] = dataclasses.replace(before, macs=before.macs + macs)
            return
        if not dynamic:
            self._sources[row] = self._origins.source(data)
        bits = (settings.weight_bits, settings.act_bits)
        self.table.append(LayerInfo(path, kind, shape, *bits, macs, name, None, None, settings))

    def _add_site(
        self, data: int, key: Key, settings: Settings, path: str, known: Key | None = None
    ) -> Key:
        """Plans to quantize what a layer reads, at its source; returns where its range is kept."""
        source = self._origins.source(data)
        site = self.sites.get(source)
        if site is None:
            self.sites[source] = Site(known or self._key(key), settings)
            return self.sites[source].key
        for field in _SHARED:
            old, new = getattr(site.settings, field), getattr(settings, field)
            if old != new:
                raise RecipeError(
                    f"quant.rules: {path} and {'/'.join(site.key[:-1])} read the same tensor, "
                    f"which cannot have {field} {new!r} and {old!r} at once."
                )
        self.sites[source] = _widened(site, settings)
        return site.key

    def _step_key(self, name: Key, settings: Settings, axes: Any, shape: Any) -> Key | None:
        if settings.weight_range != "lsq":
            return None
        if (name, axes) not in self._step_keys:
            # Named by the parameter; one at the top is its own module.
            key = name if len(name) > 1 else (*name, "weights")
            self._step_keys[name, axes] = self._key(key)
        key = self._step_keys[name, axes]
        self.steps[key] = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
        return key

    def _product(self, node: Node, kind: str, side: int) -> Product:
        primitive, params = node.equation.primitive, node.equation.params
        rank = len(self.program.avals[node.outputs[0]].shape)
        if kind == "conv":
            return Convolution(primitive, params, rank)
        return Dot(primitive, params, rank, side)

    def _shapes(self, node: Node, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        weights, output = self.program.aval(node.inputs[side]), self.program.avals[node.outputs[0]]
        return tuple(weights.shape), tuple(output.shape)

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
                before = self._origins.quantized_before(source, self.sites)
                site = self.sites[before or source]
            table[row] = dataclasses.replace(table[row], range_key=site.key, act_bits=site.bits)
        return tuple(table)

    def add_sites_behind(self) -> None:
        """Finding (c), and maxima of windows: of a quantized tensor they are quantized already."""
        for number in sorted(self.sites, reverse=True):
            before = self._origins.quantized_before(number, self.sites)
            if before is not None:
                self.sites[before] = _widened(self.sites[before], self.sites.pop(number).settings)
        waiting = sorted(self.sites)
        while waiting:
            number = waiting.pop()
            found = self._origins.behind(number, self.sites)
            if found is not None and found[0] not in self.sites:
                behind, label = found
                site = self.sites[number]
                self.sites[behind] = Site(self._key((*site.key[:-1], label)), site.settings)
                waiting.append(behind)


def _grouped(product: Product, shape: tuple[int, ...], size: int, path: str) -> GroupedDot:
    """The product with a scale for each group of inputs."""
    what = "quant.weight_granularity 'per_group'"
    if not isinstance(product, Dot) or len(product.channel_axes) != 1:
        raise RecipeError(
            f"{what} is for dense layers that sum over one axis, and {path} is none; say it in a "
            "rule that matches others only."
        )
    inputs = shape[product.channel_axes[0]]
    if inputs % size:
        raise RecipeError(f"{what}: quant.group_size {size} does not divide {inputs}, of {path}.")
    values = {f.name: getattr(product, f.name) for f in dataclasses.fields(product)}
    return GroupedDot(**values, group_size=size)


def _widened(site: Site, settings: Settings) -> Site:
    """The site with codes wide enough for another reader too."""
    bits = max(site.bits, settings.act_bits or 0)
    return dataclasses.replace(site, settings=dataclasses.replace(site.settings, act_bits=bits))


def _module(name: Key) -> Key:
    """Path of the module that holds a parameter; a parameter at the top is its own module."""
    return name[:-1] if len(name) > 1 else name
