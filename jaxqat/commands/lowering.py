"""`jaxqat lowering`: show the kernels that a device's compiler makes of an integer network."""

from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxqat.bench.networks import WIDTH, random_network
from jaxqat.commands.export import load_run_network
from jaxqat.integer._execute.executor import PLATFORMS, make_executor
from jaxqat.integer._execute.pallas_conv import COMPUTE_CAPABILITY
from jaxqat.lowering import Compiled, LoweringError, Target, compile_for, print_lowering
from jaxqat.lowering.targets import get_target


def lowering(
    workdir: Path | None,
    *,
    target: str,
    executor: str | None = None,
    batch_size: int = 256,
    width: int | None = None,
    console: Console | None = None,
) -> Compiled:
    """Compile an integer network for a device that need not be there, and show its kernels.

    Args:
        workdir: The run folder; None for a ResNet-18 with random weights.
        target: A name of `jaxqat.lowering.TARGETS`.
        executor: A way to run on it, of `jaxqat.integer._execute.executor.PLATFORMS`; None for what
            `make_executor` would take on such a device.
        batch_size: Images at a time.
        width: Of the ResNet-18, where no run is given; None for 64.
        console: Where the table is shown; None for standard output.

    Raises:
        RunFolderError: It is no run folder, or has no integer network.
        ArtifactError: The integer network is damaged.
        LoweringError: The target cannot run so, its compiler is not installed, or refuses.
    """
    name = _executor_for(get_target(target), executor)
    if workdir is not None and width is not None:
        raise LoweringError(
            f"width is of the random ResNet-18; {workdir} has a network of its own."
        )
    graph = random_network(width or WIDTH) if workdir is None else load_run_network(workdir)
    runner = make_executor(graph, platform=name)
    images = jax.ShapeDtypeStruct((batch_size, *graph.input_shape), jnp.uint8)
    compiled = compile_for(
        target, runner.apply, runner.parameters, images, compiler_options=runner.compiler_options
    )
    print_lowering(compiled, console or Console())
    return compiled


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
