"""Searches back from a tensor: for its source, and for additions and pools before it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxqat.quant._forms.operand import is_channelwise, is_number, repeats_examples
from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._plan.dependence import is_float
from jaxqat.quant._plan.plan import DATA, PARAMETERS, Dropout, Layer
from jaxqat.quant._trace.program import Atom, Constant, Program, TracedNode, inner_jaxprs


@dataclasses.dataclass(frozen=True, eq=False)
class Origins:
    """Searches back through a program.

    All of them go through dropout to the tensor before it, as if it was not there: what they find
    must be the same in training and in inference.

    Attributes:
        program: The traced computation.
        level: What each variable depends on.
        dropouts: Every dropout, by the node that ends it.
    """

    program: Program
    level: list[int]
    dropouts: Mapping[TracedNode, Dropout]

    def unconverted(self, weights: Atom) -> Atom:
        """Return the weights before casts to the compute type: codes come from the parameter."""
        node = self.program.made_by.get(weights) if isinstance(weights, int) else None
        if node is not None and primitive_of(node.name).kind is Kind.CAST:
            before = node.inputs[0]
            return self.unconverted(before) if is_float(self.program.aval(before)) else weights
        return weights

    def source(self, number: int) -> int:
        """Return the tensor that this one is a reshaped, cast or zero-padded version of."""
        number = self.before_dropout(number)
        node = self.program.made_by.get(number)
        if node is None or not primitive_of(node.name).keeps_values:
            return number
        if primitive_of(node.name).kind is Kind.PAD and not (
            isinstance(node.inputs[1], Constant) and is_number(node.inputs[1].value, 0.0)
        ):
            return number
        before = node.inputs[0]
        if not isinstance(before, int) or not is_float(self.program.avals[before]):
            return number
        return self.source(before)

    def quantized_before(self, number: int, quantized: Any) -> int | None:
        """Return the quantized tensor whose windows this one has the maxima of, if it has.

        Args:
            number: The tensor.
            quantized: The tensors to quantize.
        """
        pooled, number = False, self.before_dropout(number)
        while (node := self.program.made_by.get(number)) is not None:
            primitive = primitive_of(node.name)
            pooled |= primitive.kind is Kind.PICK
            before = node.inputs[0]
            if not primitive.picks_values or not isinstance(before, int):
                return None
            number = self.before_dropout(before)
            if number in quantized:
                return number if pooled else None
        return None

    def before(self, number: int, quantized: Any) -> tuple[int, str] | None:
        """Return the residual addition ('add') or the input of an average ('pool') before a tensor.

        Args:
            number: The tensor.
            quantized: The tensors to quantize; the search ends at them.
        """
        affine = False
        while (node := self.program.made_by.get(number)) is not None:
            primitive = primitive_of(node.name)
            big = [a for a in node.inputs if isinstance(a, int) and not self._small(a, node)]
            if primitive.kind is Kind.SELECT:  # A mask, the tensor, and what replaces parts of it.
                big = [a for a in big if self.level[a] == DATA and is_float(self.program.avals[a])]
            if primitive.kind is Kind.SUM:
                if self.level[number] != DATA or not isinstance(node.inputs[0], int):
                    return None
                return self.source(node.inputs[0]), "pool"
            if self.is_sum(node):
                return (number, "add") if affine else None
            walks = primitive.is_walked_through or _only_clips(node)
            if not walks or len(big) != 1:
                return None
            affine |= primitive.kind is Kind.AFFINE
            number = self.before_dropout(big[0])
            if number in quantized:
                return None
        return None

    def factor(self, number: int) -> float:
        """Return the factor 1 / (1 - p) of a dropout by which a tensor is larger in training.

        Between the dropout and the tensor, elements are moved, picked or pass a ReLU: all these
        results are multiplied by the factor if their operand is. It is 1 without a dropout.
        """
        node = self.program.made_by.get(number)
        if node is None:
            return 1.0
        if node in self.dropouts:
            dropout = self.dropouts[node]
            return dropout.factor * self.factor(dropout.tensor)
        terms = self.varying(node)
        picks = primitive_of(node.name).picks_values
        may_be_relu = primitive_of(node.name).kind is Kind.CLIP or _only_clips(node)
        if len(terms) != 1 or not (picks or may_be_relu):
            return 1.0
        factor = self.factor(terms[0])
        return factor if factor == 1.0 or picks or self._is_relu(node) else 1.0

    def _is_relu(self, node: TracedNode) -> bool:
        """Return whether an operation replaces negative numbers by zeros, and does nothing else."""
        if sum(isinstance(a, int) for a in node.inputs) != 1:
            return False
        aval = self.program.avals[node.outputs[0]]
        with jax.ensure_compile_time_eval():
            numbers = jnp.array([-(2.0**15), -1.0, 1.0, 2.0**15], aval.dtype)
            values = jnp.resize(numbers, aval.shape)
            operands = [values if isinstance(a, int) else a.value for a in node.inputs]
            return bool(jnp.all(node.bind(*operands)[0] == jnp.maximum(values, 0)))

    def sums_before(self, number: int, quantized: Any) -> list[TracedNode]:
        """Return the residual additions whose integer form is part of that of a tensor.

        Between the two, elements are only clipped, moved, picked or joined.

        Args:
            number: The tensor.
            quantized: The tensors to quantize; the search ends at them.
        """
        found: list[TracedNode] = []
        waiting = [number]
        while waiting:
            at = self.before_dropout(waiting.pop())
            node = self.program.made_by.get(at)
            if node is None or (at in quantized and at != number):
                continue
            terms = self.varying(node)
            if self.is_sum(node):
                found.append(node)
            elif keeps_form(node):
                waiting += terms
        return list(dict.fromkeys(found))  # A tensor can be joined with itself.

    def codes_before(
        self, number: int, quantized: Any, layers: Mapping[TracedNode, Any]
    ) -> list[int | TracedNode]:
        """Return the quantized tensors and the layers from which a tensor's form is computed."""
        found: list[int | TracedNode] = []
        waiting, seen = [number], set[int]()
        while waiting:
            at = self.before_dropout(waiting.pop())
            node = self.program.made_by.get(at)
            if at in seen:  # A recurrence has more paths than tensors.
                continue
            seen.add(at)
            if at in quantized:
                found.append(at)
            elif node is not None and node in layers:
                found.append(node)
            elif node is not None and (keeps_form(node) or primitive_of(node.name).is_elementwise):
                waiting += self.varying(node)
        return found

    def layer_before(self, number: int, layers: Mapping[TracedNode, Any]) -> TracedNode | None:
        """Return the layer whose result a tensor is, scaled, clipped or moved; None without one."""
        number = self.before_dropout(number)
        while (node := self.program.made_by.get(number)) is not None and node not in layers:
            terms = self.varying(node)
            walks = primitive_of(node.name).is_walked_through or _only_clips(node)
            if not walks or len(terms) != 1:
                return None
            number = self.before_dropout(terms[0])
        return node

    def is_read_by_sums(self, number: int) -> bool:
        """Return whether residual additions alone read a tensor, apart from moves before them."""
        return all(
            node is not None
            and (self.is_sum(node) or (self._moves(node) and self.is_read_by_sums(node.outputs[0])))
            for node in self._readers.get(number, [])
        )

    def _moves(self, node: TracedNode) -> bool:
        return primitive_of(node.name).keeps_values or node in self._drops

    def is_sum(self, node: TracedNode) -> bool:
        """Return whether a node adds two tensors of the data; a parameter is no term of its own."""
        terms = self.varying(node)
        is_sum = primitive_of(node.name).joins_branches and len(terms) == 2
        return is_sum and all(self.level[a] == DATA for a in terms)

    @functools.cached_property
    def order(self) -> dict[TracedNode, int]:
        """The place of each operation in the program."""
        return {node: place for place, node in enumerate(self.program.nodes)}

    @functools.cached_property
    def _drops(self) -> set[TracedNode]:
        """The operations that dropout is made of."""
        return {*self.dropouts, *(dropout.scaling for dropout in self.dropouts.values())}

    def before_dropout(self, number: int) -> int:
        """Return the tensor before the dropout that made a tensor; without one, the tensor."""
        node = self.program.made_by.get(number)
        if node is None or node not in self.dropouts:
            return number
        return self.before_dropout(self.dropouts[node].tensor)

    @functools.cached_property
    def _readers(self) -> dict[int, list[TracedNode | None]]:
        """Nodes that read each variable; None for a result of the program."""
        found: dict[int, list[TracedNode | None]] = {}
        for node in self.program.nodes:
            for a in node.inputs:
                if isinstance(a, int):
                    found.setdefault(a, []).append(node)
        for a in self.program.outputs:
            if isinstance(a, int):
                found.setdefault(a, []).append(None)
        return found

    def varying(self, node: TracedNode) -> list[int]:
        """Return the operands of a node that are tensors of the data, coefficients left out."""
        return [
            a
            for a in node.inputs
            if isinstance(a, int) and is_float(self.program.avals[a]) and not self._small(a, node)
        ]

    def _small(self, number: int, node: TracedNode) -> bool:
        """Return whether an operand is coefficients, the same for all examples.

        There is one per channel, or one per place if codes are multiplied, added to or joined.
        """
        shape, out = self.program.avals[number].shape, self.program.avals[node.outputs[0]].shape
        if self.level[number] < DATA and is_channelwise(shape, out):
            return True
        data = [a for a in node.inputs if isinstance(a, int) and self.level[a] == DATA]
        by_place = primitive_of(node.name).kind in (Kind.AFFINE, Kind.JOIN) and len(data) == 1
        return by_place and self._is_of_one_example(number, node)

    def has_constants_by_place(self, node: TracedNode, layers: Mapping[TracedNode, Any]) -> bool:
        """Return whether an operation combines codes with constants that differ by place.

        Only codes are padded with constants, multiplied by them or added to them: sums of products
        take coefficients by channel alone.

        Args:
            node: The operation.
            layers: The layers.
        """
        kind, avals = primitive_of(node.name).kind, self.program.avals
        others = [a for a in node.inputs if isinstance(a, int) and self._small(a, node)]
        if kind is not Kind.AFFINE:
            return kind is Kind.JOIN and bool(others)
        varying = [{axis for axis, n in enumerate(avals[a].shape) if n != 1} for a in others]
        channels = self._channels(node.outputs[0], layers)
        if channels is None:  # Reshaped: an axis of its own may be that of the channels.
            return any(len(axes) > 1 for axes in varying)
        return any(not axes <= {*channels} for axes in varying)

    def _channels(self, number: int, layers: Mapping[TracedNode, Any]) -> Sequence[int] | None:
        """Return the axes of a tensor along which coefficients may differ by channel.

        Those of a layer's result are its channels; of other tensors, the last axis is. It is not
        known for a layer's result of another shape.
        """
        node = self.program.made_by.get(number)
        last = (len(self.program.avals[number].shape) - 1,)
        if node is None:
            return last
        if node in layers:
            layer = layers[node]
            if not isinstance(layer, Layer):
                return last
            return layer.quantizer.product.output_axes(len(self.program.aval(layer.weights).shape))
        terms, kind = self.varying(node), primitive_of(node.name).kind
        order = node.equation.params.get("permutation")
        if len(terms) != 1:
            return last
        if kind is Kind.MOVE and order is None:
            return None if self.layer_before(number, layers) is not None else last
        if order is None and kind not in (Kind.AFFINE, Kind.CAST, Kind.COPY):
            return last
        before = self._channels(terms[0], layers)
        if order is None or before is None:
            return before
        return [i for i, axis in enumerate(order) if axis in before]

    def _is_of_one_example(self, number: int, node: TracedNode) -> bool:
        """Return whether an operand is a constant that is the same for all examples."""
        shape, out = self.program.avals[number].shape, self.program.avals[node.outputs[0]].shape
        if self.level[number] > PARAMETERS or not out or len(shape) != len(out):
            return False
        return shape[0] == 1 or self._repeats_examples(number)

    def _repeats_examples(self, number: int) -> bool:
        node = self.program.made_by.get(number)
        if node is None or not node.inputs:
            return False
        before = node.inputs[0]
        shapes = self.program.aval(before).shape, self.program.avals[number].shape
        return repeats_examples(
            node.equation,
            *shapes,
            lambda: isinstance(before, int) and self._repeats_examples(before),
        )


def keeps_form(node: TracedNode) -> bool:
    """Return whether a node clips, moves, picks or joins elements, whatever their form."""
    primitive = primitive_of(node.name)
    keeps = primitive.picks_values or primitive.kind in (Kind.CLIP, Kind.JOIN)
    return keeps or _only_clips(node)


def _only_clips(node: TracedNode) -> bool:
    """Return whether a node is a call whose body only clips, as `jax.nn.relu` and `relu6` do."""

    def clips(jaxpr: Any) -> bool:
        return all(
            primitive_of(e.primitive.name).kind in (Kind.CLIP, Kind.COPY)
            or _casts_a_number(e)
            or any(map(clips, inner_jaxprs(e)))
            for e in jaxpr.eqns
        )

    is_call = primitive_of(node.name).kind is Kind.CALL
    return is_call and any(map(clips, inner_jaxprs(node.equation)))


def _casts_a_number(equation: Any) -> bool:
    """Return whether an equation changes the type of a number, as of the zero in ReLU."""
    is_cast = primitive_of(equation.primitive.name).kind is Kind.CAST
    return is_cast and equation.outvars[0].aval.shape == ()
