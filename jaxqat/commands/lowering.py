"""`jaxqat lowering`: show the kernels that a device's compiler makes of an integer network."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxqat.bench.networks import WIDTH, random_network
from jaxqat.integer._execute.executor import PLATFORMS, make_executor
from jaxqat.integer._execute.pallas_conv import COMPUTE_CAPABILITY
from jaxqat.integer.graph import IntegerGraph
from jaxqat.lowering import (
    Compiled,
    LoweringError,
    LoweringTable,
    Target,
    compile_for,
    lowering_table,
)
from jaxqat.lowering.table import Row
from jaxqat.lowering.targets import get_target
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.terminal import print_table, say, tell


def lowering(
    run: Path | None = None,
    *,
    target: Literal["cpu", "sm_75", "sm_80", "sm_90", "tpu_v5e", "tpu_v6e"],
    executor: Literal["cpu", "cuda", "cuda_pallas", "tpu"] | None = None,
    batch_size: int = 256,
    width: int | None = None,
    summary: bool = False,
    console: Console | None = None,
) -> Compiled:
    """Show the kernels that a device's compiler makes of an integer network.

    The network is compiled, not run: this needs the device's compiler, but not the device.

    Args:
        run: Run folder; without one, a ResNet-18 with random weights on 32x32 images is compiled.
        target: Device to compile for.
        executor: Implementation of the integer operations to compile; by default, the one that
            `make_executor` uses on the device.
        batch_size: Images per call, 1 or more.
        width: Width of the random ResNet-18: channels of its first stage; by default 64.
        summary: Show one row for all kernels of a kind, which fits a terminal of 80 columns.
        console: Where the table is printed; None for standard output.

    Returns:
        The compiled network.

    Raises:
        RunFolderError: If the folder is not a run folder, or holds no integer network.
        ArtifactError: If the integer network is damaged.
        LoweringError: If an argument is invalid, or the compiler is not installed or fails.
    """
    name = _executor_for(get_target(target), executor)
    for option, value in (("batch_size", batch_size), ("width", width)):
        if value is not None and value < 1:
            raise LoweringError(f"{option} must be 1 or more, got {value!r}.")
    console = console or Console()
    tell(f"compiling for {target}; this takes minutes", console, style="dim")
    graph = _network(run, width)
    runner = make_executor(graph, platform=name)
    images = jax.ShapeDtypeStruct((batch_size, *graph.input_shape), jnp.uint8)
    compiled = compile_for(
        target, runner.apply, runner.parameters, images, compiler_options=runner.compiler_options
    )
    (print_summary if summary else print_lowering)(compiled, console)
    return compiled


def _network(run: Path | None, width: int | None) -> IntegerGraph:
    if run is None:
        return random_network(WIDTH if width is None else width)
    if width is not None:
        raise LoweringError(
            f"width is for the random ResNet-18 only, and {run} has its own network."
        )
    folder = RunFolder(Path(run))
    folder.load_config()
    return load_network(folder, "qat")


def _executor_for(target: Target, executor: str | None) -> str:
    if executor is None:
        pallas = target.gpu is not None and target.gpu.capability >= COMPUTE_CAPABILITY
        return "cuda_pallas" if pallas else target.platform
    fitting = [name for name in PLATFORMS if name.split("_")[0] == target.platform]
    if executor not in fitting:
        raise LoweringError(
            f"executor must be one of {', '.join(fitting)} for {target.name}, got {executor!r}."
        )
    return executor


def print_lowering(compiled: Compiled, console: Console) -> None:
    """Print the kernels of a compiled function, those with float products in red; and totals."""
    lowering = lowering_table(compiled)
    texts = ("kernel", "layer", "what", "multiplies", "writes")
    numbers = ("read", "written", *(() if lowering.cycles is None else ("cycles",)))
    cells = [_cells(row)[: len(texts + numbers)] for row in lowering.rows]
    title = f"{compiled.target}, kernels: {len(cells)}"
    red = [row.is_float for row in lowering.rows]
    print_table(title, texts + numbers, cells, console, texts=len(texts), red=red)
    say(_totals(lowering, compiled.seconds), console)


def print_summary(compiled: Compiled, console: Console) -> None:
    """Print a row for all kernels of a kind, with runs and bytes; kernels with float in red."""
    lowering, groups = lowering_table(compiled), defaultdict(list)
    for row in lowering.rows:
        groups[row.what, row.products, row.is_float].append(row)
    cells = [(what, types, *_sums(rows)) for (what, types, _), rows in groups.items()]
    title = f"{compiled.target}, kernels: {len(lowering.rows)}"
    header = ("what", "multiplies", "kernels", "runs", "read", "written")
    red = [is_float for _, _, is_float in groups]
    print_table(title, header, cells, console, texts=2, red=red)
    say(_totals(lowering, compiled.seconds), console)


def _sums(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the kernels, their runs, and the bytes of all runs, as text."""
    read = sum(row.times * row.bytes_read for row in rows)
    written = sum(row.times * row.bytes_written for row in rows)
    runs = sum(row.times for row in rows)
    return f"{len(rows):,}", f"{runs:,}", in_bytes(read), in_bytes(written)


def _cells(row: Row) -> tuple[str, ...]:
    """Return a kernel as text; the cycles come last, for devices without them to leave out."""
    name = row.kernel if row.times == 1 else f"{row.kernel} ({row.times} times)"
    sizes = in_bytes(row.bytes_read), in_bytes(row.bytes_written)
    return (name, row.layer, row.what, row.products, row.writes, *sizes, f"{row.cycles or 0:,}")


def _totals(lowering: LoweringTable, seconds: float) -> str:
    estimate = "" if lowering.cycles is None else f"; about {lowering.cycles:,} cycles"
    return (
        f"products: {lowering.integer_products} integer, {lowering.float_products} float; "
        f"{in_bytes(lowering.bytes_moved)} moved, {in_bytes(lowering.temporary_bytes)} of "
        f"temporary memory{estimate}; compiled in {seconds:.1f} s, never run"
    )


def in_bytes(count: int) -> str:
    """Return a size as text in decimal units, such as '3.1 MB'."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
