"""What a compiled module runs: its kernels, and how each of them multiplies.

A kernel is an instruction that the device executes by itself: a fusion, a library call, a copy.
What it reads and writes goes through memory; what is inside a fusion does not. A convolution or a
dot may stand in the schedule, in a library call or deep within fusions; wherever it stands, it is
an *integer product* if

- both operands of the multiplication are integers, and come from codes of at most 8 bits
  (`sources`): nothing on their way but a widening conversion, a copy or a change of shape;
- the sum is an integer too (s32). cuDNN's s8 convolution is the exception in the text only: it
  sums in s32 and converts in its epilogue, so the type that is written there is f32 or s8.

So s8 codes converted to float and convolved there are a float product, and so is what a TPU makes
of that, a convolution of s8 operands with an f32 result. `engine` says what computes it: 'cuDNN',
'cuBLAS', 'Triton' (XLA's), 'Pallas' and 'MXU' have integer units for 8-bit operands, 'YNNPACK' is
the CPU's library, and 'loop' is code that XLA writes itself, exact but slow: fine for a head of
ten classes, not for a convolution.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from jax.extend.mlir import ir

from jaxqat.lowering.hlo import Computation, Instruction, Module, Shape, parse

# Of instructions that stand in a schedule and do nothing.
_IDLE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_IDLE |= {"partition-id", "replica-id", "opt-barrier", "iota"} - {"iota"}
_CONTROL = {"while", "conditional", "call", "async-start"}
_MOVES = {"copy", "transpose", "reshape", "bitcast", "pad", "slice", "concatenate", "reverse"}
_MOVES |= {"broadcast", "dynamic-slice", "dynamic-update-slice", "gather", "copy-start"}
_MOVES |= {"slice-start", "parameter", "constant", "tuple", "get-tuple-element", "fusion"}
# What a product's operand is followed through to the codes it comes from.
_TRANSPARENT = {"copy", "transpose", "reshape", "bitcast", "pad", "reverse", "broadcast", "slice"}
_TRANSPARENT |= {"convert", "copy-done", "slice-done"}
_PRODUCTS = {"convolution": "convolution", "dot": "dot"}
_ENGINES = (
    ("cudnn", "cuDNN"),
    ("cublas", "cuBLAS"),
    ("xla.gpu.triton", "Pallas"),
    ("triton", "Triton"),
    ("ynn", "YNNPACK"),
    ("onednn", "oneDNN"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or a dot, wherever it stands.

    Attributes:
        kind: 'convolution' or 'dot'.
        operands: The two that are multiplied, as the multiplication gets them.
        sources: The types they come from: 's8' for an s32 that is a widened s8.
        result: The type of the sum, or, from a library, of what it writes.
        engine: What computes it; see the module.
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
    def layer(self) -> str:
        """Path of the module that computes it, as JAX's name stack has it."""
        return layer_of(self.op_name)

    @property
    def is_backward(self) -> bool:
        """Whether it belongs to a gradient."""
        return "transpose(" in self.op_name

    def __str__(self) -> str:
        shown = [
            shape.dtype if shape.dtype == source else f"{shape.dtype}({source})"
            for shape, source in zip(self.operands, self.sources, strict=True)
        ]
        return f"{' x '.join(shown)} -> {self.result.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A unit of execution.

    Attributes:
        name: The instruction's; of a Pallas kernel, its own.
        what: 'convolution', 'dot', 'reduce', 'copy' (moves values only), 'elementwise',
            'custom call', or the opcode.
        reads: Its operands.
        writes: What it leaves for others to read; libraries' scratch space is not among it.
        outputs: Which of `writes` are the module's results.
        bytes_read: From main memory. Of what is sliced or gathered, the part taken.
        bytes_written: To main memory. Of what is updated in place, the update.
        op_name: JAX's name for it.
        cycles: The TPU compiler's estimate.
        times: How often it runs, where loops' counts are known.
        products: The convolutions and dots in it.
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
    products: tuple[Product, ...]

    @property
    def layer(self) -> str:
        """Path of the module it belongs to, as JAX's name stack has it."""
        return layer_of(self.op_name)


def kernels(text: str) -> list[Kernel]:
    """The kernels of an optimized HLO module (CPU, CUDA or TPU), in its schedule's order."""
    module = parse(text)
    return list(_kernels(module, module.entry, 1))


def products(kernels: Iterable[Kernel]) -> list[Product]:
    """All convolutions and dots."""
    return [product for kernel in kernels for product in kernel.products]


def float_products(kernels: Iterable[Kernel]) -> list[Product]:
    """The convolutions and dots that are not integer."""
    return [product for product in products(kernels) if not product.is_integer]


def float_activations(kernels: Iterable[Kernel], *, at_least: int) -> list[tuple[Kernel, Shape]]:
    """Float tensors that one kernel writes to memory for another to read.

    Args:
        kernels: Of one module.
        at_least: Elements from which on a tensor counts: fewer than the smallest activation of a
            batch has, more than any bias or the logits have.
    """
    return [
        (kernel, shape)
        for kernel in kernels
        for number, shape in enumerate(kernel.writes)
        if shape.is_float
        and shape.space == 0
        and shape.elements >= at_least
        and number not in kernel.outputs
    ]


def layer_of(op_name: str) -> str:
    """'stage1/block0/conv1' of 'jit(step)/transpose(jvp(ResNet))/stage1/block0/conv1/conv'.

    Names of transformations and of jitted functions are left out, and so is the last part, the
    primitive.
    """
    parts = []
    for part in op_name.split("/")[:-1]:
        if re.match(r"(jit|pjit|xla_call|while|cond|body|branch_\d+_fun|closed_call)\b", part):
            continue
        while match := re.fullmatch(r"\w+\((.*)\)", part):
            part = match[1]
        if part:
            parts.append(part)
    return "/".join(parts)


def _kernels(module: Module, computation: Computation, times: int) -> Iterator[Kernel]:
    for instruction in computation.instructions.values():
        if instruction.opcode in _CONTROL:
            for name in instruction.called:
                inner = module.computations[name]
                yield from _kernels(module, inner, times * instruction.trip_count)
        elif instruction.opcode not in _IDLE and not instruction.opcode.endswith(
            ("-done", "-update")
        ):
            yield _kernel(module, computation, instruction, times)


def _kernel(
    module: Module, computation: Computation, instruction: Instruction, times: int
) -> Kernel:
    here = Place(module, computation, instruction)
    found = tuple(_products(here))
    kept = _kept(module, computation, instruction)
    writes = tuple(instruction.shapes[number] for number in sorted(kept))
    reads = tuple(
        shape
        for name in dict.fromkeys(instruction.operands)
        for shape in computation.instructions[name].shapes
    )
    pallas = re.search(r'\bname = "(\w+)"', instruction.attributes)
    is_pallas = instruction.custom_call_target == "__gpu$xla.gpu.triton"
    return Kernel(
        name=pallas[1] if is_pallas and pallas else instruction.name,
        what=_what(module, instruction, found),
        reads=reads,
        writes=writes,
        outputs=frozenset(i for i, number in enumerate(sorted(kept)) if kept[number]),
        bytes_read=_bytes_read(module, computation, instruction),
        bytes_written=_bytes_written(module, instruction, writes),
        op_name=found[0].op_name if found else instruction.op_name,
        cycles=instruction.estimated_cycles,
        times=times,
        products=found,
    )
