# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Training in less memory: between quantized tensors, only codes are kept for the backward pass.

A program is cut where every float tensor that crosses the cut is quantized. A segment between two
cuts is computed again in the backward pass (`jax.checkpoint`), from the int8 codes that it reads.
Its float results never leave it: the next segment makes them from the codes, and a tensor of
zeros, which is never stored, carries their gradient. What a reduction returns is small, and kept.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxqat.quant import _forms as forms
from jaxqat.quant._interpret.evaluator import Evaluator
from jaxqat.quant._numerics import activations
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._plan.dependence import is_float
from jaxqat.quant._plan.plan import PARAMETERS, Layer, Plan
from jaxqat.quant._trace.arguments import Key
from jaxqat.quant._trace.program import TracedNode

# Their results are kept: means and variances of batch norm, among others.
_KEPT = frozenset({"reduce_sum", "reduce_max", "reduce_min", "rsqrt"})


class SegmentedEvaluator(Evaluator):
    """Evaluates a plan in training, segment by segment.

    After `run` only results and ranges are known: all else was local to a segment.
    """

    def _run_nodes(self) -> None:
        plan = self.plan
        for node in plan.program.nodes:
            if _is_of_parameters(plan, node):
                self._run_node(node)
        for segment in segments_of(plan):
            self._run_segment(segment)
        for local in (self.codes, self.forms, self.before, self.layers, self.range_keys):
            local.clear()

    def _run_segment(self, segment: "Segment") -> None:
        outer = dict(self._known)
        names: dict[int, Key] = {}  # Of the quantized tensors; the same in every run.

        def evaluate(values: dict[int, Any], codes: dict[int, Any]) -> Any:
            given = {n: dataclasses.replace(outer[n], values=x) for n, x in values.items()}
            given |= {n: _restored(outer[n], values[n], codes[n]) for n in codes}
            self._known = {**outer, **given}
            before = self._states.snapshot()
            for node in segment.nodes:
                self._run_node(node)
            made = {n: self._known[n] for n in segment.crossing}
            quantized = {n: x.form for n, x in made.items() if isinstance(x.form, forms.Codes)}
            names.update({n: form.name for n, form in quantized.items()})
            values = {n: _carrier(x) if n in quantized else x.values for n, x in made.items()}
            codes = {n: (form.codes, form.grid) for n, form in quantized.items()}
            return values, codes, self._states.since(before)

        read = {n: outer[n] for n in segment.reads}
        values = {n: x.values for n, x in read.items()}
        codes = {
            n: (x.form.codes, x.form.grid)
            for n, x in read.items()
            if isinstance(x.form, forms.Codes)
        }
        found, codes, states = jax.checkpoint(evaluate, policy=_is_kept)(values, codes)
        self._known = outer
        self._states.update(states)
        for number, value in found.items():
            form = None
            if number in codes:
                made, grid = codes[number]
                form = forms.Codes(made, grid, names[number])
            self._known[number] = forms.Operand(value, form, constant=False)


def _restored(operand: forms.Operand, carrier: Any, parts: tuple[Any, Grid]) -> forms.Operand:
    """Return a quantized tensor of another segment, made from its codes and their grid."""
    codes, grid = parts
    real = activations.dequantize(codes, grid, carrier.dtype)
    assert isinstance(operand.form, forms.Codes)
    form = forms.Codes(codes, grid, operand.form.name)
    return dataclasses.replace(operand, values=_with_gradient(carrier, real), form=form)


def _carrier(operand: forms.Operand) -> Any:
    """Return zeros with the gradient of a tensor."""
    assert operand.values is not None
    return _with_gradient(operand.values, jnp.zeros_like(operand.values))


@jax.custom_vjp
def _with_gradient(x: Any, values: Any) -> Any:
    """Return `values` with the gradient of x, which is not read.

    `activations.in_place_of` is for any derivative, and reads it.
    """
    del x
    return values


_with_gradient.defvjp(
    lambda x, values: (values, ()),  # pyright: ignore[reportUnknownLambdaType]
    lambda _, gradient: (gradient, jnp.zeros_like(gradient)),  # pyright: ignore[reportUnknownLambdaType]
)


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in _KEPT


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Operations that are computed again together.

    Attributes:
        nodes: The operations, in order.
        reads: What they read of earlier segments.
        crossing: What they make and later segments, or the caller of the program, read.
    """

    nodes: tuple[TracedNode, ...]
    reads: tuple[int, ...]
    crossing: tuple[int, ...]


def segments_of(plan: Plan) -> tuple[Segment, ...]:
    """Cut a plan's program behind each tensor that a layer reads, where only quantized ones cross.

    A term of a sum, which no layer reads, is computed again with the sum.
    """
    nodes = [node for node in plan.program.nodes if not _is_of_parameters(plan, node)]
    made_at = {number: place for place, node in enumerate(nodes) for number in node.outputs}
    read_last: dict[int, int] = {}
    for place, node in enumerate(nodes):
        read_last.update({n: place for n in _reads(plan, node) if n in made_at})
    whole = {
        place
        for number, last in read_last.items()
        if number not in plan.tensors and is_float(plan.program.avals[number])
        for place in range(made_at[number], last)
    }
    ends = [
        place
        for place, node in enumerate(nodes[:-1])
        if place not in whole and any(_is_layer_input(plan, n) for n in node.outputs)
    ]
    returned = {a for a in plan.program.outputs if isinstance(a, int)}
    found: list[Segment] = []
    for start, end in itertools.pairwise([0, *(end + 1 for end in ends), len(nodes)]):
        inside = nodes[start:end]
        read = {n for node in inside for n in _reads(plan, node) if n in made_at}
        made = {n for node in inside for n in node.outputs}
        crossing = {n for n in made if n in returned or read_last.get(n, -1) >= end}
        found.append(Segment(tuple(inside), tuple(sorted(read - made)), tuple(sorted(crossing))))
    return tuple(found)


def _is_of_parameters(plan: Plan, node: TracedNode) -> bool:
    """Return whether an operation depends on parameters and constants only."""
    return node not in plan.layers and all(plan.level[n] <= PARAMETERS for n in node.outputs)


def _is_layer_input(plan: Plan, number: int) -> bool:
    tensor = plan.tensors.get(number)
    return tensor is not None and not tensor.readers


def _reads(plan: Plan, node: TracedNode) -> list[int]:
    """Return the variables that the evaluation of an operation reads."""
    found = [a for a in node.inputs if isinstance(a, int)]
    layer = plan.layers.get(node)
    if isinstance(layer, Layer) and isinstance(layer.weights, int):
        found.append(layer.weights)
    dropout = plan.dropouts.get(node)
    return found if dropout is None else [*found, dropout.tensor]
