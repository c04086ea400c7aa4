"""Which tensors must be codes, so that what follows them up to a quantized tensor has a form.

Between a product and the next quantized tensor may be batch norm, ReLU, moves and residual
additions: these have forms of their own. Anything else is a function of codes: the argument of
swish or gelu is quantized, and so is what a later batch norm scales by channel, or to which a
position embedding is added.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxqat.quant._forms.primitives import Kind, primitive_of
from jaxqat.quant._plan.origins import Origins, keeps_form
from jaxqat.quant._plan.plan import DATA, PARAMETERS
from jaxqat.quant._trace.program import INLINED, Atom, Constant, Program, TracedNode, inner_jaxprs


def arguments_before(
    origins: Origins, number: int, quantized: Any, layers: Mapping[TracedNode, Any]
) -> list[int]:
    """Return the tensors that must be quantized for a tensor to have an integer form.

    What has none even then, as behind layer normalization, is left as it is.

    Args:
        origins: Searches back through the program.
        number: The tensor.
        quantized: The tensors to quantize; the search ends at them.
        layers: The layers; the search ends at them too.
    """
    found = dict.fromkeys(_arguments(origins, number, quantized, layers))
    known: dict[int, bool] = {}
    return [a for a in found if _can_be_codes(origins, a, quantized, layers, known)]


def _arguments(
    origins: Origins, number: int, quantized: Any, layers: Mapping[TracedNode, Any]
) -> Iterator[int]:
    waiting = [(number, False, False)]
    while waiting:
        at, is_affine, is_by_channel = waiting.pop()
        at = origins.before_dropout(at)
        node = origins.program.made_by.get(at)
        if node is None or node in layers or (at in quantized and at != number):
            continue
        terms = origins.varying(node)
        if origins.has_constants_by_place(node, layers):
            # Constants one after the other are one: of a class token, and of positions.
            for term in terms:
                before = origins.program.made_by.get(origins.before_dropout(term))
                if before is not None and origins.has_constants_by_place(before, layers):
                    waiting.append((term, False, False))
                else:
                    yield term
        elif keeps_form(node):
            if is_affine and not primitive_of(node.name).keeps_values:
                # Codes can be scaled by channel; what is clipped cannot. Joined tensors have
                # channels of different widths, for which one grid is too coarse.
                if primitive_of(node.name).kind is not Kind.JOIN:
                    yield at
            else:
                waiting += [(a, is_affine, is_by_channel) for a in terms]
        elif origins.is_sum(node):
            continue
        elif primitive_of(node.name).kind is Kind.AFFINE and len(terms) == 1:
            others = (a for a in node.inputs if a not in terms)
            by_channel = not all(_is_number(a, origins.program) for a in others)
            waiting.append((terms[0], True, is_by_channel or by_channel))
        else:
            source = _source(origins, node, quantized)
            factors = _factors(node, origins)
            if (is_by_channel and source is not None) or (is_affine and factors):
                yield at
            elif source is not None:
                yield source
            else:
                yield from factors


def _factors(node: TracedNode, origins: Origins) -> list[int]:
    """Return the two tensors that an operation multiplies element by element; else nothing."""
    factors = origins.varying(node)
    multiplies = primitive_of(node.name).multiplies_branches and len(factors) == 2
    return factors if multiplies and all(origins.level[a] == DATA for a in factors) else []


def _can_be_codes(
    origins: Origins,
    number: int,
    quantized: Any,
    layers: Mapping[TracedNode, Any],
    known: dict[int, bool],
) -> bool:
    """Return whether a tensor is computed from codes by operations with integer forms.

    Args:
        origins: Searches back through the program.
        number: The tensor.
        quantized: The tensors to quantize.
        layers: The layers.
        known: The answers so far: a recurrence has more paths than tensors.
    """
    at = origins.before_dropout(number)
    node = origins.program.made_by.get(at)
    if at in quantized or node in layers:
        return True
    if node is None:
        return False
    if at not in known:
        terms = _read_as_codes(node, origins, quantized)
        known[at] = bool(terms) and all(
            _can_be_codes(origins, a, quantized, layers, known) for a in terms
        )
    return known[at]


def _read_as_codes(node: TracedNode, origins: Origins, quantized: Any) -> list[int]:
    """Return the tensors that the integer form of a result is computed from; none without one."""
    primitive, terms = primitive_of(node.name), origins.varying(node)
    if primitive.kind is Kind.SUM:
        terms = terms if _is_spatial(node, origins.program) else []
    elif not (keeps_form(node) or origins.is_sum(node) or _is_scaled(node, terms)):
        source = _source(origins, node, quantized)
        terms = _factors(node, origins) if source is None else [source]
    return terms


def _is_scaled(node: TracedNode, terms: list[int]) -> bool:
    return primitive_of(node.name).kind is Kind.AFFINE and len(terms) == 1


def _is_spatial(node: TracedNode, program: Program) -> bool:
    """Return whether a sum is over the axes between the batch and the channels."""
    axes, rank = node.equation.params.get("axes"), len(program.aval(node.inputs[0]).shape)
    return axes is None or tuple(sorted(axes)) == tuple(range(1, rank - 1))


def _source(origins: Origins, node: TracedNode, quantized: Any) -> int | None:
    """Return the one tensor that an operation's result is a function of, element by element.

    Of several, it is the first one, but behind scales, shifts and clips of a product: these have
    forms.

    Args:
        origins: Searches back through the program.
        node: The operation, which has no form of its own.
        quantized: The tensors to quantize; the search ends at them.
    """
    program, order = origins.program, origins.order
    terms, found, has_form = set(_data(node, origins)), None, False
    while _is_function(node, origins):
        has_form &= _has_form(node, origins)
        if len(terms) == 1:
            (source,) = terms
            if not has_form or source in quantized:
                found, has_form = source, True
        makers = {a: program.made_by.get(a) for a in terms}
        if not terms or None in makers.values() or any(a in quantized for a in terms):
            return found
        node = max((each for each in makers.values() if each is not None), key=order.__getitem__)
        if origins.is_sum(node) and len(terms) == 1:
            return found
        terms = {a for a in terms if makers[a] is not node} | {*_data(node, origins)}
    return found


def _data(node: TracedNode, origins: Origins) -> list[int]:
    """Return the operands of an operation that depend on the data."""
    return [a for a in node.inputs if isinstance(a, int) and origins.level[a] == DATA]


def _has_form(node: TracedNode, origins: Origins) -> bool:
    """Return whether an operation clips one tensor, or scales or shifts it."""
    if keeps_form(node):
        return True
    return primitive_of(node.name).kind is Kind.AFFINE and len(_data(node, origins)) == 1


def _is_function(node: TracedNode, origins: Origins) -> bool:
    """Return whether an operation computes each element of its result from single elements.

    Besides tensors of the data, of the shape of the result, it reads single numbers, or one for
    each channel.
    """
    program = origins.program
    if node in origins.dropouts or len(node.outputs) != 1 or not _is_elementwise(node.equation):
        return False
    shape = program.avals[node.outputs[0]].shape
    return all(
        program.aval(a).shape == shape
        if isinstance(a, int) and origins.level[a] == DATA
        else _is_by_channel(a, program, len(shape)) and _is_parameter(a, origins)
        for a in node.inputs
    )


def _is_elementwise(equation: Any) -> bool:
    primitive = primitive_of(equation.primitive.name)
    if primitive.kind is Kind.CALL or equation.primitive.name in INLINED:
        return all(map(_is_elementwise, next(inner_jaxprs(equation)).eqns))
    repeats_number = primitive.repeats and equation.invars[0].aval.shape == ()
    return primitive.is_elementwise or repeats_number


def _is_parameter(atom: Atom, origins: Origins) -> bool:
    return isinstance(atom, Constant) or origins.level[atom] <= PARAMETERS


def _is_by_channel(atom: Atom, program: Program, rank: int) -> bool:
    """Return whether an operand is one number, or one for each position of the last axis.

    Args:
        atom: The operand.
        program: The program.
        rank: Number of axes of the result.
    """
    aval = program.aval(atom)
    if _is_number(atom, program) or rank < 2:
        return _is_number(atom, program)
    if len(aval.shape) == rank and aval.size == aval.shape[-1]:
        return True
    node = program.made_by.get(atom) if isinstance(atom, int) else None
    if node is None or not primitive_of(node.name).repeats:
        return False
    inner, axes = program.aval(node.inputs[0]), node.equation.params.get("broadcast_dimensions")
    is_vector = bool(inner.shape) and inner.size == inner.shape[-1]
    return is_vector and axes is not None and axes[-1] == rank - 1


def _is_number(atom: Atom, program: Program) -> bool:
    """Return whether all elements of an operand are one number, by the way it was made."""
    if program.aval(atom).size == 1:
        return True
    node = program.made_by.get(atom) if isinstance(atom, int) else None
    return (
        node is not None and primitive_of(node.name).repeats and _is_number(node.inputs[0], program)
    )
