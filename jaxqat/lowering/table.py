"""What a compiled function runs, as a table: kernel by kernel, and in total."""

import dataclasses

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxqat.lowering.kernels import Kernel, kernels
from jaxqat.lowering.targets import Compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A kernel.

    Attributes:
        kernel: Its name.
        layer: Path of the module that it belongs to; '' if the compiler kept none.
        what: See `Kernel.what`.
        products: What it multiplies, such as 's8 x s8 -> s32'; '' if it multiplies nothing.
        is_float: Whether one of its products is not integer.
        writes: Types and shapes of its results.
        bytes_read: In one run.
        bytes_written: In one run.
        cycles: Of one run, by the TPU compiler's estimate; None elsewhere.
        times: How often it runs.
    """

    kernel: str
    layer: str
    what: str
    products: str
    is_float: bool
    writes: str
    bytes_read: int
    bytes_written: int
    cycles: int | None
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweringTable:
    """All kernels of a compiled function, and their sums.

    Attributes:
        rows: In the order of the schedule.
        integer_products: Convolutions and dots that multiply codes as integers.
        float_products: The others.
        bytes_moved: Read and written by all kernels, as often as they run.
        temporary_bytes: Memory for what lies between them.
        cycles: The sum of the estimates; None where there are none.
    """

    rows: tuple[Row, ...]
    integer_products: int
    float_products: int
    bytes_moved: int
    temporary_bytes: int
    cycles: int | None


def lowering_table(compiled: Compiled) -> LoweringTable:
    """The kernels of a compiled function as rows, and their totals."""
    found = kernels(compiled.text)
    rows = tuple(_row(kernel) for kernel in found)
    are_integer = [product.is_integer for kernel in found for product in kernel.products]
    cycles = [row.cycles * row.times for row in rows if row.cycles is not None]
    return LoweringTable(
        rows=rows,
        integer_products=sum(are_integer),
        float_products=len(are_integer) - sum(are_integer),
        bytes_moved=sum(row.times * (row.bytes_read + row.bytes_written) for row in rows),
        temporary_bytes=compiled.temporary_bytes,
        cycles=sum(cycles) if cycles else None,
    )


def print_lowering(compiled: Compiled, console: Console) -> None:
    """Show the kernels of a compiled function; float products stand out."""
    lowering = lowering_table(compiled)
    table = Table(title=f"{compiled.target}, kernels: {len(lowering.rows)}")
    for column in ("kernel", "layer", "what", "multiplies", "writes"):
        table.add_column(column, overflow="fold")
    numbers = ["read", "written"] + (["cycles"] if lowering.cycles is not None else [])
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for row in lowering.rows:
        name = row.kernel if row.times == 1 else f"{row.kernel} ({row.times} times)"
        # Text, since rich would read brackets as markup.
        cells = [Text(t) for t in (name, row.layer, row.what, row.products, row.writes)]
        sizes = [in_bytes(row.bytes_read), in_bytes(row.bytes_written)]
        cycles = [f"{row.cycles or 0:,}"] if lowering.cycles is not None else []
        table.add_row(*cells, *sizes, *cycles, style="bold red" if row.is_float else None)
    console.print(table)
    estimate = "" if lowering.cycles is None else f"; about {lowering.cycles:,} cycles"
    console.print(
        f"products: {lowering.integer_products} integer, {lowering.float_products} float; "
        f"{in_bytes(lowering.bytes_moved)} moved, {in_bytes(lowering.temporary_bytes)} of "
        f"temporary memory{estimate}; compiled in {compiled.seconds:.1f} s, never run",
        highlight=False,
        soft_wrap=True,
    )


def in_bytes(count: int) -> str:
    """'3.1 MB', in decimal units."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _row(kernel: Kernel) -> Row:
    return Row(
        kernel=kernel.name,
        layer=kernel.layer,
        what=kernel.what,
        products=", ".join(dict.fromkeys(product.types for product in kernel.products)),
        is_float=not all(product.is_integer for product in kernel.products),
        writes=", ".join(str(shape) for shape in kernel.writes),
        bytes_read=kernel.bytes_read,
        bytes_written=kernel.bytes_written,
        cycles=kernel.cycles,
        times=kernel.times,
    )
