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
from typing import Any, NoReturn

from jaxqat.errors import RecipeError
from jaxqat.quant._numerics.grouped import GroupedDot
from jaxqat.quant._numerics.multiply import QuantizedProduct
from jaxqat.quant._numerics.products import Convolution, Dot, Product
from jaxqat.quant._numerics.weights import QuantizedWeights
from jaxqat.quant._plan.dependence import dependence, is_float
from jaxqat.quant._plan.origins import Origins
from jaxqat.quant._plan.plan import (
    DATA,
    LEFT_BY_RECIPE,
    NO_WEIGHTS,
    PARAMETERS,
    Layer,
    LayerInfo,
    Lookup,
    Pair,
    Plan,
    Site,
)
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import (
    PRODUCTS,
    Atom,
    Constant,
    Node,
    Program,
    inner_jaxprs,
    products_inside,
)
from jaxqat.quant.recipe import Recipe, Settings

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
    level, names = dependence(program, paths, is_data)
    planner = _Planner(program, level, names, recipe)
    for node in program.nodes:
        planner.visit(node)
    planner.add_sites_behind()
    table = planner.finished_table()
    return Plan(program, level, planner.layers, planner.sites, planner.steps, table)


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
        self._step_keys: dict[tuple[Any, Any], Key] = {}
        self._sources: dict[int, int] = {}  # Row of the table -> the tensor the layer reads.
        self._repeats: dict[Any, tuple[Key, int]] = {}  # Turns of a loop share range and row.
        self._dynamic: dict[int, str] = {}  # What layers of dynamic ranges read, and their paths.
        weighted = [node for node in program.nodes if self._has_weights(node)]
        self._edges = {self._turn(node) for node in (*weighted[:1], *weighted[-1:])}

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
        edge = self._turn(node) in self._edges
        settings = self.recipe.settings("/".join(_module(name)), kind, at_edge=edge)
        reason = self._why_not(node, kind, side, settings)
        if reason is not None or settings is None:
            return self._leave(node, kind, side, name, reason)
        self._plan(node, kind, side, name, settings)

    def _has_weights(self, node: Node) -> bool:
        if node.name == "gather":
            return self._looked_up(node) is not None
        return node.name in PRODUCTS and self._side(node) is not None

    def _turn(self, node: Node) -> Any:
        """What a layer is known by: in a loop, the same in all turns that share its weights."""
        if not node.loop:
            return node
        names = (self.names.get(a) for a in node.inputs if isinstance(a, int))
        return (node.loop, id(node.equation), next((n for n in names if n), None))

    def _depends(self, node: Node) -> list[int]:
        return [PARAMETERS if isinstance(a, Constant) else self.level[a] for a in node.inputs]

    def _side(self, node: Node) -> int | None:
        """Which operand of a product depends on parameters only, if one does."""
        depends = self._depends(node)
        one = min(depends) == PARAMETERS < max(depends)
        return depends.index(PARAMETERS) if one else None

    def _looked_up(self, node: Node) -> Key | None:
        """The name of the table of parameters that a node looks up in, as embeddings are."""
        table, depends = node.inputs[0], self._depends(node)
        aval = self.program.aval(table)
        rows = is_float(aval) and len(aval.shape) == 2
        if not rows or depends[0] != PARAMETERS or max(depends[1:]) != DATA:
            return None
        return self.names.get(table) if isinstance(table, int) else None

    def _visit_gather(self, node: Node) -> None:
        name = self._looked_up(node)
        if name is None:
            return
        table, path = node.inputs[0], "/".join(_module(name))
        aval = self.program.aval(table)
        settings = self.recipe.settings(path, "embed", at_edge=self._turn(node) in self._edges)
        shape = tuple(aval.shape)
        if settings is None:
            row = LayerInfo(path, "embed", shape, None, None, 0, name, None, LEFT_BY_RECIPE)
            return self.table.append(row)
        if settings.weight_granularity == "per_group":
            raise RecipeError(
                f"quant.weight_granularity 'per_group' is for dense layers, and {path} is a table "
                "of embeddings; say it in a rule that matches others only."
            )
        axes = (0, 1) if settings.weight_granularity == "per_tensor" else (1,)
        how = QuantizedWeights(settings, axes, aval.dtype)
        step_key = self._step_key(node, table, name, settings, axes)
        self.layers[node] = Lookup(len(self.table), path, how, table, step_key)
        bits = settings.weight_bits
        self.table.append(
            LayerInfo(path, "embed", shape, bits, None, 0, name, None, None, settings)
        )

    def _visit_pair(self, node: Node, kind: str) -> None:
        """A product without weights: quantized only if a rule of the kind 'attention' says so."""
        path = "/".join(p for p in (node.scope, f"{node.name}{len(self.table)}") if p)
        if max(self._depends(node)) == PARAMETERS:
            reason = "both operands depend on parameters only"
            return self._leave(node, kind, 1, (path, ""), reason)
        settings = None if kind == "conv" else self.recipe.settings(path, "attention")
        avals = [self.program.aval(a) for a in node.inputs]
        if settings is None and any(r.matches(path, "attention") for r in self.recipe.rules):
            return self._leave(node, "attention", 1, (path, ""), LEFT_BY_RECIPE)
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
        turn = self._turn(node)
        key, row = self._repeats.get(turn, (None, len(self.table)))
        if dynamic:
            self._dynamic[self._origins.source(data)] = path
        else:
            key = self._add_site(data, key or (*_module(name), "input"), settings, path, key)
        if node.loop:
            self._repeats[turn] = (key or (), row)
        weights = self._origins.unconverted(node.inputs[side])
        step_key = self._step_key(node, weights, name, settings, axes)
        how = QuantizedProduct(settings, axes, dtype, product)
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
        self.sites[source] = _widened(site, settings, path)
        return site.key

    def _step_key(
        self, node: Node, weights: Atom, name: Key, settings: Settings, axes: tuple[int, ...]
    ) -> Key | None:
        """Where the learned step sizes of weights are kept: the same weights have the same."""
        if settings.weight_range != "lsq":
            return None
        same = (self._turn(node) if node.loop else weights, axes)
        if same not in self._step_keys:
            # Named by the parameter; one at the top is its own module.
            self._step_keys[same] = self._key(name if len(name) > 1 else (*name, "weights"))
        key, shape = self._step_keys[same], self.program.aval(weights).shape
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
                popped = self.sites.pop(number)
                path = "/".join(popped.key[:-1])
                self.sites[before] = _widened(self.sites[before], popped.settings, path)
        for number, path in self._dynamic.items():
            before = self._origins.quantized_before(number, self.sites)
            site = self.sites.get(number if before is None else before)
            if site is not None:
                _refuse(path, site, "act_range", "dynamic")
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


def _widened(site: Site, settings: Settings, path: str) -> Site:
    """The site with codes wide enough for another reader too, the layer of this path."""
    for field in _SHARED:
        if getattr(site.settings, field) != getattr(settings, field):
            _refuse(path, site, field, getattr(settings, field))
    bits = max(site.bits, settings.act_bits or 0)
    return dataclasses.replace(site, settings=dataclasses.replace(site.settings, act_bits=bits))


def _refuse(path: str, site: Site, field: str, value: object) -> NoReturn:
    raise RecipeError(
        f"quant.rules: {path} and {'/'.join(site.key[:-1])} read the same tensor, "
        f"which cannot have {field} {value!r} and {getattr(site.settings, field)!r} at once."
    )


def _module(name: Key) -> Key:
    """Path of the module that holds a parameter; a parameter at the top is its own module."""
    return name[:-1] if len(name) > 1 else name
