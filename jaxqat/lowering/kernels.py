"""The kernels of a compiled module and their memory traffic.

A kernel is an instruction that the device runs by itself: a fusion, a library call, a copy. Its
operands and results go through memory; values inside a fusion do not.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from jaxqat.lowering.hlo import Computation, Instruction, Module, Shape, parse
from jaxqat.lowering.products import (
    PALLAS_TARGET,
    CompiledProduct,
    Place,
    find_products,
    pallas_name,
)

# Scheduled instructions without computation. In addition, "...-done" waits for "...-start".
_IDLE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_IDLE |= {"partition-id", "replica-id", "opt-barrier"}
_IDLE_TARGETS = {"ConcatBitcast", "AllocateBuffer"}
_CONTROL = {"while", "conditional", "call", "async-start"}
_MOVES = {"copy", "transpose", "reshape", "bitcast", "pad", "slice", "concatenate", "reverse"}
_MOVES |= {"broadcast", "dynamic-slice", "dynamic-update-slice", "gather", "parameter"}
_MOVES |= {"constant", "tuple", "get-tuple-element", "fusion", "copy-start", "slice-start"}
_NAMED = ("scatter", "select-and-scatter", "sort", "reduce-window", "reduce", "rng-bit-generator")
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel and its memory traffic in one run.

    Attributes:
        name: Name of the instruction, or of the Pallas kernel as its source has it.
        what: Kind of work: 'convolution', 'dot', 'reduce', 'copy' (moves values only),
            'elementwise', or another opcode or custom-call target.
        reads: Shapes of its operands.
        writes: Shapes of its results that other instructions read; without scratch space.
        outputs: Positions in `writes` that are results of the module.
        bytes_read: Bytes read from main memory; a slice or gather reads only its part.
        bytes_written: Bytes written to main memory; an update in place writes only the update.
        op_name: JAX's name of the operation.
        cycles: Cycles of one run, estimated by the TPU's compiler; None on other devices.
        times: Number of runs: iterations of the loops around it, 1 for an unknown number.
        products: Convolutions and dots in the kernel.
    """

    name: str
    what: str
    reads: tuple[Shape, ...]
    writes: tuple[Shape, ...]
    outputs: frozenset[int]
    bytes_read: int
    bytes_written: int
    op_name: str
    cycles: int | None
    times: int
    products: tuple[CompiledProduct, ...]

    @property
    def layer(self) -> str:
        """Paths of the computed modules, from JAX's name stack; '' if unknown."""
        names = [product.op_name for product in self.products] or [self.op_name]
        return ", ".join(dict.fromkeys(filter(None, map(layer_of, names))))


def kernels(text: str) -> list[Kernel]:
    """List the kernels of an optimized HLO module (CPU, CUDA or TPU) in scheduled order."""
    module = parse(text)
    return list(_scheduled(module, module.entry, None, 1))


def products(kernels: Iterable[Kernel]) -> list[CompiledProduct]:
    """List the convolutions and dots of all kernels."""
    return [product for kernel in kernels for product in kernel.products]


def layer_of(op_name: str) -> str:
    """Return the module's path in JAX's name of an operation.

    'jit(f)/jvp(Net)/conv1/dot_general' gives 'Net/conv1': transformations, jitted functions,
    control flow and the primitive at the end are removed.
    """
    name = re.sub(r"\bp?jit\([^()]*\)", "", op_name)
    name = re.sub(r"\w+\(|\)", "", name)  # A transformation encloses one part or several.
    inner = re.compile(r"(while|cond|body|closed_call|branch_\d+_fun)?$")
    return "/".join(part for part in name.split("/")[:-1] if not inner.match(part))


def _scheduled(
    module: Module, computation: Computation, caller: Place | None, times: int
) -> Iterator[Kernel]:
    for instruction in computation.instructions.values():
        place = Place(module, computation, instruction, caller)
        if instruction.opcode in _CONTROL:
            # Not for a loop: its body has a tuple as parameter, and sources are not traced through.
            inlined = place if instruction.opcode in ("call", "async-start") else None
            for name in instruction.called:
                inner = module.computations[name]
                yield from _scheduled(module, inner, inlined, times * instruction.trip_count)
        elif not _is_idle(instruction):
            yield _kernel(place, times)


def _is_idle(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return instruction.custom_call_target in _IDLE_TARGETS
    return instruction.opcode in _IDLE or instruction.opcode.endswith("-done")


def _kernel(place: Place, times: int) -> Kernel:
    instruction, computation = place.instruction, place.computation
    found = tuple(find_products(place))
    written = _written(place)
    writes = tuple(shape for shape, _ in written)
    return Kernel(
        name=pallas_name(instruction) or instruction.name,
        what=_what(place, found),
        reads=tuple(
            shape
            for name in dict.fromkeys(instruction.operands)
            for shape in computation.instructions[name].shapes
        ),
        writes=writes,
        outputs=frozenset(i for i, (_, returned) in enumerate(written) if returned),
        bytes_read=sum(_bytes_read(place, name) for name in dict.fromkeys(instruction.operands)),
        bytes_written=_bytes_written(place, writes),
        op_name=instruction.op_name,
        cycles=instruction.estimated_cycles,
        times=times,
        products=found,
    )


def _what(place: Place, found: tuple[CompiledProduct, ...]) -> str:
    instruction = place.instruction
    if found:
        return "convolution" if any(p.kind == "convolution" for p in found) else "dot"
    if instruction.opcode == "custom-call":
        is_pallas = instruction.custom_call_target == PALLAS_TARGET
        return "Pallas" if is_pallas else instruction.custom_call_target
    opcodes = set(_opcodes(place))
    if opcodes <= _MOVES:
        return "copy"
    return next((name for name in _NAMED if name in opcodes), "elementwise")


def _opcodes(place: Place) -> Iterator[str]:
    yield place.instruction.opcode
    if place.instruction.opcode == "fusion":
        for inner in place.within():
            yield from _opcodes(inner)


def _written(place: Place) -> list[tuple[Shape, bool]]:
    """Return the shapes that other instructions read, and whether each is a module's result."""
    instruction, users = place.instruction, place.computation.users[place.instruction.name]
    if instruction.opcode.endswith("-start"):
        return [(s, _is_returned(place, user)) for user in users for s in user.shapes]
    elements = [user for user in users if user.opcode == "get-tuple-element"]
    if elements:
        read = {user.index: _is_returned(place, user) for user in elements}
        return [(instruction.shapes[number], read[number]) for number in sorted(read)]
    # Its parts are not read: it is an array, or a tuple returned as a whole.
    return [(shape, _is_returned(place, instruction)) for shape in instruction.shapes]


def _is_returned(place: Place, instruction: Instruction) -> bool:
    computation = place.computation
    if computation is not place.module.entry:
        return False
    if instruction is computation.root:
        return True
    return any(
        user is computation.root
        if user.opcode == "tuple"
        else user.opcode == "bitcast" and _is_returned(place, user)
        for user in computation.users[instruction.name]
    )


def _bytes_read(place: Place, name: str) -> int:
    """Return the number of bytes that a kernel reads from one operand."""
    instruction = place.instruction
    shapes = [s for s in place.computation.instructions[name].shapes if s.space == 0]
    if not shapes:
        return 0
    if instruction.opcode == "fusion":
        inner = place.module.computations[instruction.called[0]]
        numbers = [i for i, operand in enumerate(instruction.operands) if operand == name]
        readers = [
            (inner.parameters[i].name, u)
            for i in numbers
            for u in inner.users[inner.parameters[i].name]
        ]
    else:
        readers = [(name, instruction)]
    whole = sum(shape.bytes for shape in shapes)
    return min(whole, sum(_part_read(name, reader, whole) for name, reader in readers))


def _part_read(name: str, reader: Instruction, whole: int) -> int:
    """Return the number of bytes that an instruction reads from an operand of `whole` bytes."""
    if name in reader.operands[1:]:
        return whole
    if reader.opcode in _SLICES:
        return sum(shape.bytes for shape in reader.shapes)
    return 0 if reader.opcode == "dynamic-update-slice" else whole


def _bytes_written(place: Place, writes: tuple[Shape, ...]) -> int:
    computation, instruction = place.computation, place.instruction
    if instruction.opcode == "fusion":
        computation = place.module.computations[instruction.called[0]]
        instruction = computation.root
    if instruction.opcode == "dynamic-update-slice":
        writes = computation.instructions[instruction.operands[1]].shapes
    return sum(shape.bytes for shape in writes if shape.space == 0)
