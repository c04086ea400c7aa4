"""Where a tensor comes from: what is quantized in its place, and what stands behind it."""

import dataclasses
from typing import Any

from jaxqat.quant._forms.derive import MOVES, is_channelwise, is_number
from jaxqat.quant._plan.dependence import is_float
from jaxqat.quant._plan.plan import DATA
from jaxqat.quant._trace.program import Atom, Constant, Node, Program, inner_jaxprs

_AFFINE = ("add", "sub", "mul", "div", "neg")


_SOURCE_MOVES = MOVES - {"reduce_window_max"} | {"pad"}


@dataclasses.dataclass(frozen=True, eq=False)
class Origins:
    """Walks back through a program.

    Attributes:
        program: The traced computation.
        level: What each variable depends on.
    """

    program: Program
    level: list[int]

    def unconverted(self, weights: Atom) -> Atom:
        """The weights before a cast to the compute type: codes come from the parameter itself."""
        node = self.program.made_by.get(weights) if isinstance(weights, int) else None
        if node is not None and node.name == "convert_element_type":
            before = node.inputs[0]
            return self.unconverted(before) if is_float(self.program.aval(before)) else weights
        return weights

    def source(self, number: int) -> int:
        """The tensor that reshaping, casting and zero padding made this one from."""
        node = self.program.made_by.get(number)
        if node is None or node.name not in _SOURCE_MOVES:
            return number
        if node.name == "pad" and not (
            isinstance(node.inputs[1], Constant) and is_number(node.inputs[1].value, 0.0)
        ):
            return number
        before = node.inputs[0]
        if not isinstance(before, int) or not is_float(self.program.avals[before]):
            return number
        return self.source(before)

    def quantized_before(self, number: int, quantized: Any) -> int | None:
        """The quantized tensor that this one is maxima of windows of, if it is.

        Args:
            number: The tensor.
            quantized: The tensors that are to be quantized.
        """
        pooled = False
        while (node := self.program.made_by.get(number)) is not None:
            pooled |= node.name == "reduce_window_max"
            before = node.inputs[0]
            moves = node.name in _SOURCE_MOVES | {"reduce_window_max"}
            if not moves or not isinstance(before, int):
                return None
            number = before
            if number in quantized:
                return number if pooled else None
        return None

    def behind(self, number: int, quantized: Any) -> tuple[int, str] | None:
        """The residual addition ('add') or the input of an average ('pool') behind a tensor."""
        affine = False
        while (node := self.program.made_by.get(number)) is not None:
            big = [a for a in node.inputs if isinstance(a, int) and not self._small(a, node)]
            if node.name == "select_n":  # Dropout: a mask, the tensor, and zeros.
                big = [a for a in big if self.level[a] == DATA and is_float(self.program.avals[a])]
            if node.name in ("reduce_sum", "reduce_window_sum"):
                if self.level[number] != DATA or not isinstance(node.inputs[0], int):
                    return None
                return self.source(node.inputs[0]), "pool"
            if len(big) == 2 and node.name == "add":
                return (number, "add") if affine else None
            passes = node.name in _SOURCE_MOVES or node.name in ("max", "min", "reduce_window_max")
            passes = passes or node.name in (*_AFFINE, "select_n") or _is_clamp_call(node)
            if not passes or len(big) != 1:
                return None
            affine |= node.name in _AFFINE
            number = big[0]
            if number in quantized:
                return None
        return None

    def _small(self, number: int, node: Node) -> bool:
        """Whether an operand is coefficients: one per channel, not depending on single examples."""
        shape, out = self.program.avals[number].shape, self.program.avals[node.outputs[0]].shape
        return self.level[number] < DATA and is_channelwise(shape, out)


def _is_clamp_call(node: Node) -> bool:
    """Whether a call that is kept whole only clips, as `jax.nn.relu` and `relu6` do."""
    jaxprs = list(inner_jaxprs(node.equation))

    def clips(jaxpr: Any) -> bool:
        return all(
            e.primitive.name in ("max", "min") or any(map(clips, inner_jaxprs(e)))
            for e in jaxpr.eqns
        )

    return node.name in ("custom_jvp_call", "jit") and any(map(clips, jaxprs))
