"""What each variable of a program depends on, and which parameter names it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxqat.quant._forms.primitives import primitive_of
from jaxqat.quant._plan.plan import CONSTANTS, DATA, PARAMETERS, STATISTICS, VARIABLES
from jaxqat.quant._trace.arguments import ArgumentKind, Key
from jaxqat.quant._trace.program import Program, TracedNode

_LEVELS = {"parameter": PARAMETERS, "variable": VARIABLES, "input": DATA}


def dependence(
    program: Program, paths: Sequence[Key | None], kinds: Sequence[ArgumentKind]
) -> tuple[list[int], dict[int, Key]]:
    """Return what each variable depends on, and names of those that depend on the model only.

    The name is the path of the first parameter that went into the variable; without parameters, of
    the first variable of the model.

    Args:
        program: The traced computation.
        paths: For each flat argument, the path of the parameter or variable it is; None for data.
        kinds: For each flat argument, what it is.
    """
    level = [CONSTANTS] * len(program.avals)
    names: dict[int, Key] = {}
    for number, path, kind in zip(program.inputs, paths, kinds, strict=True):
        level[number] = _LEVELS[kind]
        if path is not None:
            names[number] = path
    for node in program.nodes:
        reads = [a for a in node.inputs if isinstance(a, int)]
        depends = max((level[a] for a in reads), default=CONSTANTS)
        if primitive_of(node.name).may_be_statistic and _is_statistic(node, program):
            depends = min(depends, STATISTICS)
        if any(a in program.carried and is_float(program.avals[a]) for a in node.outputs):
            depends = DATA  # From the second iteration on, if not before.
        name = next((names[a] for a in reads if a in names and level[a] == depends), None)
        for number in node.outputs:
            level[number] = depends
            if name is not None:
                index = program.iterations.get(number)
                names[number] = name if index is None else (*name[:-1], str(index), name[-1])
    return level, names


def _is_statistic(node: TracedNode, program: Program) -> bool:
    """Return whether a reduction leaves at most one axis, not the first, as in batch norm."""
    axes = node.equation.params["axes"]
    return 0 in axes and len(axes) >= len(program.aval(node.inputs[0]).shape) - 1


def is_float(aval: Any) -> bool:
    """Return whether a tensor holds real numbers."""
    return jnp.issubdtype(aval.dtype, jnp.floating)
