"""Convolutions and dots in optimized HLO, wherever they hide, and what they multiply.

A product stands in the schedule, in a library call, deep within fusions, in a Pallas kernel, or is
taken apart into a multiplication and a sum. Wherever it stands, it is an *integer product* if

- both operands of the multiplication are integers, and come from codes of at most 8 bits: nothing
  on their way but widening conversions, copies and changes of shape (`sources`);
- their sum is an integer (s32). cuDNN is an exception in the text only: its s8 convolution sums in
  s32 and converts at its end, so the type that stands there is f32 or s8.

So s8 codes that are converted to float and convolved there are a float product, and so is what the
TPU's compiler makes of that, a convolution of s8 operands with an f32 sum. `engine` says what
computes it: 'cuDNN', 'cuBLAS', 'Triton' (XLA's own), 'Pallas' and the TPU's 'MXU' have units for
8-bit operands, 'YNNPACK' is the CPU's library; 'XLA' is a loop that XLA writes itself, exact but
slow.
"""

import dataclasses
import re
from collections.abc import Iterator

from jax.extend.mlir import ir
from jaxlib.triton import dialect as triton

from jaxqat.lowering.hlo import Computation, Instruction, Module, Shape

PALLAS_TARGET = "__gpu$xla.gpu.triton"
INTEGER_ENGINES = ("cuDNN", "cuBLAS", "Triton", "Pallas", "YNNPACK", "MXU")

# An operand is followed through these to where its values come from.
_TRANSPARENT = {"convert", "copy", "transpose", "reshape", "bitcast", "pad", "reverse", "slice"}
_TRANSPARENT |= {"broadcast", "dynamic-slice", "copy-start", "copy-done"}

_LIBRARIES = (("cudnn", "cuDNN"), ("cublas", "cuBLAS"), ("triton", "Triton"), ("ynn", "YNNPACK"))
_LIBRARIES = (*_LIBRARIES, ("onednn", "oneDNN"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or a dot.

    Attributes:
        kind: 'convolution' or 'dot'. A Pallas kernel is a convolution if 'conv' is in its name.
        operands: The two that are multiplied, as the multiplication gets them.
        sources: The types they come from: 's8' of an s32 that is a widened s8.
        result: The sum; of a library, what it writes.
        engine: What computes it, see the module.
        op_name: JAX's name for it.
    """

    kind: str
    operands: tuple[Shape, ...]
    sources: tuple[str, ...]
    result: Shape
    engine: str
    op_name: str

    @property
    def is_integer(self) -> bool:
        """Whether codes are multiplied and summed as integers."""
        if any(shape.is_float for shape in self.operands):
            return False
        if not all(Shape(dtype, ()).is_code for dtype in self.sources):
            return False
        return self.engine == "cuDNN" or not self.result.is_float

    @property
    def is_backward(self) -> bool:
        """Whether it belongs to a gradient, going by its name, which compilers may drop."""
        return "transpose(" in self.op_name

    @property
    def types(self) -> str:
        """'s8 x s8 -> s32'; 's32(s8)' is a widened s8."""
        shown = (
            shape.dtype if shape.dtype == source else f"{shape.dtype}({source})"
            for shape, source in zip(self.operands, self.sources, strict=True)
        )
        return f"{' x '.join(shown)} -> {self.result.dtype}"


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """An instruction, and the one that calls the computation it stands in."""

    module: Module
    computation: Computation
    instruction: Instruction
    caller: "Place | None" = None

    def operand(self, number: int) -> "Place":
        """Where an operand is made."""
        name = self.instruction.operands[number]
        return self.at(self.computation.instructions[name])

    def at(self, instruction: Instruction) -> "Place":
        """Another instruction of the same computation."""
        return dataclasses.replace(self, instruction=instruction)

    def within(self) -> Iterator["Place"]:
        """The instructions of the computation that a fusion calls."""
        for name in self.instruction.called:
            inner = self.module.computations[name]
            for instruction in inner.instructions.values():
                yield Place(self.module, inner, instruction, self)


def find_products(place: Place) -> Iterator[Product]:
    """The convolutions and dots of a kernel."""
    opcode = place.instruction.opcode
    if opcode == "fusion":
        for inner in place.within():
            yield from find_products(inner)
    elif opcode in ("convolution", "dot"):
        yield _product(place, place, _kind(place.instruction), place.instruction.shapes[0])
    elif opcode == "custom-call":
        yield from _library_product(place)
    elif opcode == "reduce":
        factors = _factors(place)
        if factors is not None:
            yield _product(factors, place, _kind(place.instruction), place.instruction.shapes[0])


def pallas_name(instruction: Instruction) -> str | None:
    """The name of a Pallas kernel, as its author gave it."""
    if instruction.custom_call_target != PALLAS_TARGET:
        return None
    name = re.search(r'\bname = "(\w+)"', instruction.attributes)
    return name[1] if name else instruction.name


def _product(multiplication: Place, named: Place, kind: str, result: Shape) -> Product:
    """The product of a place's first two operands, under another's name."""
    factors = [multiplication.operand(0), multiplication.operand(1)]
    return Product(
        kind=kind,
        operands=tuple(factor.instruction.shapes[0] for factor in factors),
        sources=tuple(_source(factor).dtype for factor in factors),
        result=result,
        engine=_engine(multiplication),
        op_name=named.instruction.op_name,
    )


def _kind(instruction: Instruction) -> str:
    """A TPU has no dot but a convolution without a window, or one over the batch dimensions."""
    if instruction.opcode == "dot" or instruction.op_name.endswith("dot_general"):
        return "dot"
    labels = re.search(r"\bdim_labels=(\w+)_", instruction.attributes)
    return "dot" if labels and not re.search(r"\d", labels[1]) else "convolution"


def _engine(place: Place) -> str:
    outermost = place
    while outermost is not None:
        mark = outermost.instruction.fusion_kind or outermost.instruction.custom_call_target
        for part, engine in _LIBRARIES:
            if part in mark.lower():
                return engine
        if outermost.instruction.estimated_cycles and place.instruction.opcode == "convolution":
            return "MXU"
        outermost = outermost.caller
    return "XLA"


def _library_product(place: Place) -> Iterator[Product]:
    """A library call, or a Pallas kernel."""
    target = place.instruction.custom_call_target
    if target == PALLAS_TARGET:
        yield from _pallas_products(place.instruction)
    elif (
        re.search(r"conv|gemm|matmul", target, re.IGNORECASE)
        and len(place.instruction.operands) > 1
    ):
        kind = "convolution" if "conv" in target.lower() else "dot"
        yield _product(place, place, kind, place.instruction.shapes[0])


def _factors(reduce: Place) -> Place | None:
    """The multiplication that a sum of products adds up, where a dot was taken apart into both."""
    place = reduce.operand(0)
    while place.instruction.opcode in _TRANSPARENT:
        place = place.operand(0)
    if place.instruction.opcode != "multiply":
        return None
    names = (reduce.instruction.op_name, place.instruction.op_name)
    return place if any(re.search(r"(dot_general|conv\w*)$", name) for name in names) else None


def _source(place: Place) -> Shape:
    """The narrowest type that the values had on their way here without loss."""
    shape = place.instruction.shapes[0]
    while not shape.is_code:
        previous = _previous(place)
        if previous is None:
            break
        earlier = previous.instruction.shapes[0]
        if earlier.dtype != shape.dtype and earlier.bits >= shape.bits:
            break  # A conversion that rounds: the values are made here.
        place, shape = previous, earlier
    return shape


def _previous(place: Place) -> Place | None:
    """Where the same values stand before an instruction that leaves them as they are."""
    instruction = place.instruction
    if instruction.opcode in _TRANSPARENT:
        return place.operand(0)
    if instruction.opcode == "parameter" and place.caller is not None:
        return place.caller.operand(instruction.index)
    if instruction.opcode == "fusion":
        return _root(place)
    if instruction.opcode == "get-tuple-element":
        made = place.operand(0)
        root = _root(made) if made.instruction.opcode == "fusion" else None
        if root is not None and root.instruction.opcode == "tuple":
            return root.operand(instruction.index)
    return None


def _root(fusion: Place) -> Place:
    inner = fusion.module.computations[fusion.instruction.called[0]]
    return Place(fusion.module, inner, inner.root, fusion)


def _pallas_products(instruction: Instruction) -> Iterator[Product]:
    """The dots of a Pallas kernel, read from its Triton IR; equal ones (unrolled) count as one."""
    name = pallas_name(instruction) or ""
    found = {}
    for line in _triton_ir(instruction).splitlines():
        types = re.search(
            r'"tt\.dot"\(.*: \(tensor<(\S+)>, tensor<(\S+)>, tensor<(\S+)>\) ->', line
        )
        if types:
            found[types.groups()] = tuple(_tensor(text) for text in types.groups())
    for left, right, result in found.values():
        yield Product(
            kind="convolution" if "conv" in name else "dot",
            operands=(left, right),
            sources=(left.dtype, right.dtype),
            result=result,
            engine="Pallas",
            op_name=instruction.op_name.replace(f"/{name}/pallas_call", "/pallas_call"),
        )


def _tensor(text: str) -> Shape:
    """'128x64xi8'. Triton's integers carry no sign; its dot takes them as signed."""
    *dims, dtype = text.split("x")
    dtype = re.sub(r"^i(?=\d)", "s", dtype.lower())
    return Shape(dtype, tuple(map(int, dims)))


def _triton_ir(instruction: Instruction) -> str:
    """The kernel's program: MLIR bytecode, escaped, among the call's attributes."""
    escaped = re.search(r'\bir = "((?:[^"\\]|\\.)*)"', instruction.attributes)
    if escaped is None:
        raise ValueError(
            f"HLO instruction {instruction.name!r}: a Pallas kernel without its program."
        )
    code = re.sub(
        rb"\\([0-9A-Fa-f]{2}|.)",
        lambda match: bytes.fromhex(match[1].decode()) if len(match[1]) == 2 else match[1],
        escaped[1].encode("latin-1"),
        flags=re.DOTALL,
    )
    with ir.Context() as context:
        triton.register_dialect(context)
        program = ir.Module.parse(code).operation
        return str(program.get_asm(print_generic_op_form=True, enable_debug_info=False))
