"""Execution on NVIDIA GPUs from sm_80 on, with a convolution kernel that writes s8 codes.

Each two-dimensional convolution and its requantization are one Pallas kernel; at the end of a
residual block the kernel adds the shortcut too. Between such layers, only s8 goes to memory. The
kernel does not support grouped, one- and three-dimensional convolutions, fixed point or a real
result; these run as in `Cuda`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from jaxqat.integer import graph as g
from jaxqat.integer._execute import pallas_conv, pallas_tiles
from jaxqat.integer._execute.cuda import Cuda


class PallasCuda(Cuda):
    """Compute convolutions with the Pallas kernel, and all else as `Cuda`.

    Attributes:
        interpret: Whether to run the kernels as JAX operations, for tests without a GPU.
        fused: Convolution whose kernel computes an addition, by the addition's name.
    """

    interpret: ClassVar[bool] = False

    def __init__(self, graph: g.IntegerGraph):
        self._geometry = {p.name: self._kernel_geometry(graph, p) for p in graph.products()}
        self.fused = {
            node.name: branch
            for node in graph.nodes
            if isinstance(node, g.Add) and (branch := self._fused_branch(graph, node)) is not None
        }
        self._branch_names = {branch.name for branch in self.fused.values()}
        super().__init__(graph)

    def _kernel_geometry(
        self, graph: g.IntegerGraph, node: g.Product
    ) -> pallas_tiles.Geometry | None:
        if node.kind != "conv" or graph.requantization != "float" or len(node.window) != 2:
            return None
        if node.output not in graph.tensors:
            return None
        shape = graph.tensors[node.inputs[0]].shape
        options = {"strides": node.strides, "padding": node.padding, "dilation": node.dilation}
        reason = pallas_tiles.unsupported_reason(
            (1, *shape), node.weights, node.bias, groups=node.groups, **options
        )
        if reason is not None:
            return None
        return pallas_tiles.Geometry(size=shape[:2], window=node.window, **options)  # pyright: ignore[reportArgumentType]

    def _fused_branch(self, graph: g.IntegerGraph, add: g.Add) -> g.Product | None:
        """Return a convolution whose result nothing but this addition reads; None without one."""
        if any(map(graph.is_output, add.inputs)) or add.inputs[0] == add.inputs[1]:
            return None
        made_by = {p.output: p for p in graph.products() if self._geometry[p.name] is not None}
        alone = (name for name in add.inputs if len(graph.readers(name)) == 1)
        return next((made_by[name] for name in alone if name in made_by), None)

    def prepare(self, node: g.Product) -> dict[str, np.ndarray]:
        """Return weights and bias as the kernel reads them; without a kernel, as `Cuda`."""
        geometry = self._geometry[node.name]
        if geometry is None:
            return super().prepare(node)
        zero_in = self.stored_zero(node.inputs[0])
        weights, bias = pallas_tiles.lay_out(
            node.weights, node.bias, geometry=geometry, zero_in=zero_in
        )
        return {"weights": weights, "bias": bias}

    def visited_nodes(self) -> Iterable[g.Node]:
        """Return all nodes except fused branches, whose results are not in memory."""
        return (node for node in self.graph.nodes if node.name not in self._branch_names)

    def node(
        self,
        node: g.Node,
        values: Mapping[str, Array],
        parameters: Mapping[str, Any],
    ) -> Array:
        """Compute one node; an addition together with its fused branch."""
        branch = self.fused.get(node.name)
        if branch is None or not isinstance(node, g.Add):
            return super().node(node, values, parameters)
        with jax.named_scope(node.name):
            return self._add_to_branch(node, branch, values, parameters)

    def _add_to_branch(
        self,
        node: g.Add,
        branch: g.Product,
        values: Mapping[str, Array],
        parameters: Mapping[str, Any],
    ) -> Array:
        index = node.inputs.index(branch.output)
        other = node.inputs[1 - index]
        tensor = self.graph.tensors[branch.output]
        residual = pallas_conv.Residual(
            codes=values[other],
            zero_point=self.graph.tensors[other].zero_point,
            multiplier=node.multipliers[1 - index],
            branch_zero_point=tensor.zero_point,
            branch_low=tensor.low,
            branch_high=tensor.high,
            branch_multiplier=node.multipliers[index],
        )
        arrays, codes = parameters[branch.name], values[branch.inputs[0]]
        return self._convolve(branch, arrays, codes, node.output, residual)

    def product(self, node: g.Product, arrays: dict[str, Array], x: Array) -> Array:
        """Return a convolution or a dense layer with its requantization."""
        if self._geometry[node.name] is None:
            return super().product(node, arrays, x)
        return self._convolve(node, arrays, x, node.output, None)

    def _convolve(
        self,
        node: g.Product,
        arrays: dict[str, Array],
        codes: Array,
        output: str,
        residual: pallas_conv.Residual | None,
    ) -> Array:
        tensor, geometry = self.graph.tensors[output], self._geometry[node.name]
        assert geometry is not None
        return pallas_conv.convolve(
            codes,
            arrays["weights"],
            arrays["bias"],
            arrays["multiplier"],
            geometry=geometry,
            zero_out=tensor.zero_point,
            low=tensor.low,
            high=tensor.high,
            residual=residual,
            interpret=self.interpret,
        )
