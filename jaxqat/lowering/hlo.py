"""Parse the text of XLA's optimized HLO into instructions.

A module is a set of computations, one of them the entry; a computation is a list of instructions

    %name = type opcode(%operand, ...), attribute=value, ...

in scheduled order. A type is `dtype[dims]{layout}` or a tuple of types. A layout is the order of
the axes; then `T(8,128)` means that a TPU pads the last axes to multiples of 8 and 128, and `S(n)`
is the memory space, 0 by default; space 1 of a TPU is its on-chip vector memory. Only what
`kernels` needs is parsed; the text omits the values of large constants.
"""

import dataclasses
import functools
import math
import re


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array in memory.

    Attributes:
        dtype: Type in HLO's notation: 's8', 'bf16', 'f32', 'pred', ...
        dims: Size of each axis.
        space: Memory space; 0 is the device's main memory.
        padded: Number of values including padding; None without padding.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    padded: int | None = None

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Width of one value in bits; 0 for a token."""
        if self.dtype == "pred":
            return 8
        width = re.search(r"\d+", self.dtype)
        return int(width[0]) if width else 0

    @property
    def bytes(self) -> int:
        """Size in memory in bytes, padding included."""
        elements = self.elements if self.padded is None else self.padded
        return (elements * self.bits + 7) // 8

    @property
    def is_float(self) -> bool:
        """Whether the values are floating-point (or complex) numbers."""
        return self.dtype.startswith(("f", "bf", "c"))

    @property
    def is_code(self) -> bool:
        """Whether the values are integers of at most 8 bits."""
        return self.dtype[0] in "su" and 0 < self.bits <= 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Name, unique in its computation.
        opcode: Operation: 'fusion', 'convolution', ...
        shapes: Shape of the result, or shapes of a tuple's leaves.
        operands: Names of the operands, which are instructions of the same computation.
        attributes: Rest of the line after the operands.
        literal: Text in the parentheses: a parameter's number, a constant's value.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls."""
        names = re.findall(
            r"\b(?:calls|to_apply|body|condition|\w+_computation)=%([\w.\-]+)", self.attributes
        )
        for group in re.findall(r"\b(?:branch|called)_computations=\{([^}]*)\}", self.attributes):
            names += re.findall(r"%([\w.\-]+)", group)
        return tuple(names)

    @functools.cached_property
    def op_name(self) -> str:
        """Path of JAX's name stack, ending with the primitive; '' without one."""
        return self._find(r'\bop_name="([^"]*)"')

    @functools.cached_property
    def custom_call_target(self) -> str:
        """Name of the function that a custom call calls; '' for other instructions."""
        return self._find(r'custom_call_target="([^"]*)"')

    @functools.cached_property
    def fusion_kind(self) -> str:
        """Library or code generator of a custom fusion; '' for XLA's own loops."""
        return self._find(r'"fusion(?:_backend)?_config":\{"kind":"(\w[^"]*)"')

    @functools.cached_property
    def estimated_cycles(self) -> int | None:
        """Estimate of the TPU's compiler; None on other devices."""
        cycles = self._find(r'"estimated_cycles":"(\d+)"')
        return int(cycles) if cycles else None

    @functools.cached_property
    def trip_count(self) -> int:
        """Number of iterations of a loop; 1 if unknown."""
        count = self._find(r'"known_trip_count":\{"n":"(\d+)"')
        return int(count) if count else 1

    @functools.cached_property
    def index(self) -> int:
        """Position of a parameter, or of the element that a get-tuple-element takes."""
        return int(self.literal if self.opcode == "parameter" else self._find(r"\bindex=(\d+)"))

    def _find(self, pattern: str) -> str:
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, in scheduled order; the root is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by position."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {parameter.index: parameter for parameter in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read a value, by the name of the value."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """Computations by name, one of them the entry."""

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Parse the text of a module.

    Raises:
        ValueError: The text has no entry computation, or a line is not an instruction.
    """
    computations: dict[str, Computation] = {}
    entry, header, lines = None, None, []
    for line in text.splitlines():
        if header is None:
            header = re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line)
        elif line.startswith("}"):
            computation = _computation(header[2], lines)
            computations[computation.name] = computation
            entry = computation if header[1] else entry
            header, lines = None, []
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("the text holds no HLO module: no line begins with 'ENTRY'.")
    return Module(computations, entry)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions = {}
    root = None
    for line in lines:
        instruction = _instruction(line)
        instructions[instruction.name] = instruction
        if line.lstrip().startswith("ROOT ") or root is None:
            root = instruction
    if root is None:
        raise ValueError(f"HLO computation {name!r} is empty.")
    return Computation(name, instructions, root)


def _instruction(line: str) -> Instruction:
    head = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = ", line)
    if head is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:120]!r}.")
    end = _end_of_type(line, head.end())
    call = re.compile(r" ([\w\-]+)\(").match(line, end)
    if call is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:120]!r}.")
    close = _closing(line, call.end() - 1)
    inside = line[call.end() : close]
    constant = call[1] == "constant"
    return Instruction(
        name=head[1],
        opcode=call[1],
        shapes=_shapes(line[head.end() : end]),
        operands=() if constant else tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=line[close + 1 :],
        literal=inside,
    )


def _end_of_type(line: str, start: int) -> int:
    if line[start] == "(":
        return _closing(line, start) + 1
    return line.index(" ", start)


def _closing(line: str, start: int) -> int:
    """Return the position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"not an HLO instruction: {line.strip()[:120]!r}.")


_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?|\btoken\b")


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for match in _SHAPE.finditer(text):
        if match[1]:
            dims = tuple(int(n.lstrip("<=")) for n in match[2].split(",") if n)
            layout = match[3] or ""
            space = re.search(r"S\((\d+)\)", layout)
            padded = _padded(dims, layout)
            shapes.append(Shape(match[1], dims, int(space[1]) if space else 0, padded))
        else:
            shapes.append(Shape("token", ()))
    return tuple(shapes)


def _padded(dims: tuple[int, ...], layout: str) -> int | None:
    """Return the number of values with padding: minor axes are multiples of the first tile."""
    tile = re.search(r":T\(([\d,]+)\)", layout)
    if tile is None:
        return None
    extents = [int(n) for n in tile[1].split(",")]
    order = [int(n) for n in layout.split(":")[0].split(",") if n]
    sizes = [dims[axis] for axis in reversed(order)]  # The layout begins with the minor axis.
    sizes = [1] * (len(extents) - len(sizes)) + sizes
    whole, tiled = sizes[: -len(extents)], sizes[-len(extents) :]
    return math.prod(whole) * math.prod(
        -(-size // extent) * extent for size, extent in zip(tiled, extents, strict=True)
    )
