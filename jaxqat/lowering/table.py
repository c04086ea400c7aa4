"""The kernels of a compiled function as a table, with totals."""

import dataclasses

from jaxqat.lowering.kernels import Kernel, kernels
from jaxqat.lowering.targets import Compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A kernel as text and numbers.

    Attributes:
        kernel: Name of the kernel.
        layer: Path of the module it belongs to; '' if the compiler dropped it.
        what: Kind of work, see `Kernel.what`.
        products: Types it multiplies, such as 's8 x s8 -> s32'; '' without a product.
        is_float: Whether one of its products is not an integer product.
        writes: Types and shapes of its results.
        bytes_read: Bytes read in one run.
        bytes_written: Bytes written in one run.
        cycles: Estimate of the TPU's compiler for one run; None on other devices.
        times: Number of runs.
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
    """All kernels of a compiled function, with totals.

    Attributes:
        rows: The kernels, in scheduled order.
        integer_products: Number of integer products.
        float_products: Number of all other convolutions and dots.
        bytes_moved: Bytes read and written by all runs of all kernels.
        temporary_bytes: Memory for intermediate values.
        cycles: Sum of the estimated cycles of all runs; None without estimates.
    """

    rows: tuple[Row, ...]
    integer_products: int
    float_products: int
    bytes_moved: int
    temporary_bytes: int
    cycles: int | None


def lowering_table(compiled: Compiled) -> LoweringTable:
    """Return the table of a compiled function."""
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
