"""What `jaxqat doctor` finds, and how it is printed. Needs no JAX."""

import dataclasses
from collections.abc import Mapping, Sequence

from rich.console import Console

from jaxqat.pipeline.terminal import print_table, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is wrong.

    Attributes:
        what: What is wrong.
        repair: What to do about it.
    """

    what: str
    repair: str

    def __str__(self) -> str:
        return f"{self.what}. {self.repair}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestedProduct:
    """An integer product of one shape, computed in one way and compared with NumPy.

    Attributes:
        way: What computed it: the integer network, a training step, or ONNX Runtime.
        shape: The shape in words.
        layers: The run's layers of this shape.
        kernel: What multiplies: types and library; empty if it is unknown.
        values: Number of sums and codes that were compared.
        differing: Number of them that differ.
        largest: Largest difference.
        error: Why it could not be computed; empty if it could.
    """

    way: str
    shape: str
    layers: tuple[str, ...]
    kernel: str
    values: int
    differing: int
    largest: float
    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        versions: Version of Python and of each package; None if it is not installed.
        processor: Model and architecture of the processor.
        instructions: Its features that multiply 8-bit integers, as far as the system tells.
        devices: The devices that JAX sees.
        executor: The form in which the integer network runs on the first of them; empty if there is
            none.
        compilation_cache: Folder in which JAX keeps compiled programs; None without one.
        free_bytes: Free space by folder: of the run, of decoded images, of compiled programs.
        products: The products that were tested.
        notes: What is worth knowing, and not wrong.
        problems: What is wrong.
    """

    versions: Mapping[str, str | None]
    processor: str
    instructions: tuple[str, ...]
    devices: tuple[str, ...]
    executor: str
    compilation_cache: str | None
    free_bytes: Mapping[str, int]
    products: tuple[TestedProduct, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong, and what to do about it; empty if nothing is."""
        return tuple(map(str, self.problems))


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print what was found, and at the end what is wrong."""
    rows = [(name, version or "not installed") for name, version in found.versions.items()]
    print_table("versions", ("package", "version"), rows, console, texts=2)
    say(f"processor: {found.processor}", console)
    say(f"its instructions for 8-bit products: {', '.join(found.instructions) or '–'}", console)
    say(f"devices of JAX: {', '.join(found.devices) or '–'}", console)
    say(f"the integer network runs as: {found.executor or '–'}", console)
    say(f"compiled programs are kept in: {found.compilation_cache or '–'}", console)
    for folder, free in found.free_bytes.items():
        say(f"free space: {free / 1e9:,.1f} GB in {folder}", console)
    _print_products(found.products, console)
    for note in found.notes:
        say(f"note: {note}.", console)
    for problem in found.problems:
        say(f"wrong: {problem.what}.", console, style="bold red")
        say(f"  {problem.repair}", console)
    if not found.problems:
        numbers = sum(each.values for each in found.products)
        say(f"nothing is wrong: {numbers:,} sums and codes are those of NumPy", console)


def _print_products(products: Sequence[TestedProduct], console: Console) -> None:
    """Print what multiplies in each way, and how many numbers of each shape are wrong in each."""
    ways, shapes = (list(dict.fromkeys(getattr(x, k) for x in products)) for k in ("way", "shape"))
    for way in ways:
        kernels = dict.fromkeys(x.kernel for x in products if x.way == way and x.kernel)
        say(f"products of {way}: {'; '.join(kernels) or 'unknown'}", console)
    if not products:
        return
    cells = {(x.shape, x.way): "failed" if x.error else f"{x.differing:,}" for x in products}
    rows = [(shape, *(cells.get((shape, way), "") for way in ways)) for shape in shapes]
    red = [any(cell not in ("0", "") for cell in row[1:]) for row in rows]
    header = ("shape", *(way.replace(" ", "\n") for way in ways))
    print_table("wrong sums and codes of integer products", header, rows, console, red=red)
