"""Compile for an accelerator without the hardware: XLA's compilers need only its description.

`compile_for` returns the program of a function for one target, as optimized HLO, and its memory.
The compilers come with the wheels of `jax[cuda13]` and `jax[tpu]`; they need no driver, device or
network access. Nothing is run or timed.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from jaxqat.errors import InputError

Platform = Literal["cpu", "cuda", "tpu"]


class LoweringError(InputError):
    """A function cannot be compiled for a target; the message names the target and the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Properties of an NVIDIA GPU that XLA needs (data sheet, CUDA's device properties).

    Attributes:
        name: Name that the driver reports.
        capability: Major and minor compute capability.
        cores: Number of streaming multiprocessors.
        lanes: Number of float32 units per multiprocessor.
        threads: Largest number of resident threads per multiprocessor.
        shared_bytes: Shared memory per multiprocessor, bytes.
        block_bytes: Shared memory that one block can opt in to, bytes.
        l2_bytes: Second-level cache, bytes.
        memory_bytes: Device memory, bytes.
        bandwidth: Bandwidth of the device memory, bytes per second.
        clock_ghz: Boost clock, GHz.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared_bytes: int
    block_bytes: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: int
    clock_ghz: float

    def config(self) -> str:
        """Return XLA's GpuTargetConfig, a protocol buffer in text form."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {self.threads}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.block_bytes}
  l2_cache_size: {self.l2_bytes}
  device_memory_size: {self.memory_bytes}
  memory_bandwidth: {self.bandwidth}
  clock_rate_ghz: {self.clock_ghz}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A device to compile for.

    Attributes:
        name: Short name, such as 'sm_90'.
        platform: JAX's platform: 'cpu', 'cuda' or 'tpu'.
        description: Displayed name of the device.
        gpu: Properties of an NVIDIA GPU; None for other devices.
        topology: Name and shape of a TPU in libtpu's notation; '' for other devices.
    """

    name: str
    platform: Platform
    description: str
    gpu: Gpu | None = None
    topology: str = ""

    def __str__(self) -> str:
        return f"{self.description} ({self.name})"


_T4 = Gpu(
    name="Tesla T4",
    capability=(7, 5),
    cores=40,
    lanes=64,
    threads=1024,
    shared_bytes=64 << 10,
    block_bytes=64 << 10,
    l2_bytes=4 << 20,
    memory_bytes=15_843_721_216,
    bandwidth=320 * 10**9,
    clock_ghz=1.59,
)
_A100 = Gpu(
    name="NVIDIA A100-SXM4-40GB",
    capability=(8, 0),
    cores=108,
    lanes=64,
    threads=2048,
    shared_bytes=164 << 10,
    block_bytes=163 << 10,
    l2_bytes=40 << 20,
    memory_bytes=42 * 10**9,
    bandwidth=1555 * 10**9,
    clock_ghz=1.41,
)
_H200 = Gpu(
    name="NVIDIA H200",
    capability=(9, 0),
    cores=132,
    lanes=128,
    threads=2048,
    shared_bytes=228 << 10,
    block_bytes=227 << 10,
    l2_bytes=60 << 20,
    memory_bytes=150 * 10**9,
    bandwidth=4800 * 10**9,
    clock_ghz=1.98,
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="cpu", platform="cpu", description="this machine's CPU"),
        Target(name="sm_75", platform="cuda", description="NVIDIA T4", gpu=_T4),
        Target(name="sm_80", platform="cuda", description="NVIDIA A100", gpu=_A100),
        Target(name="sm_90", platform="cuda", description="NVIDIA H200", gpu=_H200),
        Target(name="tpu_v5e", platform="tpu", description="TPU v5e", topology="v5e:2x2"),
        Target(name="tpu_v6e", platform="tpu", description="TPU v6e", topology="v6e:2x2"),
    )
}

# Autotuning would time algorithms on the device.
_OPTIONS: dict[str, dict[str, Any]] = {"cuda": {"xla_gpu_autotune_level": 0}}

_WHEELS = {"cuda": 'pip install "jax[cuda13]"', "tpu": 'pip install "jax[tpu]"'}

# libtpu needs these variables on a machine without a TPU; one with a TPU sets its own.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # Otherwise it waits for Google's metadata server.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Otherwise a second process fails on /tmp/libtpu_lockfile, which guards a device.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A function compiled for a target.

    Attributes:
        target: Device it was compiled for.
        text: Optimized HLO module.
        argument_bytes: Memory of the arguments, bytes.
        temporary_bytes: Memory of intermediate values, bytes.
        seconds: Time for tracing and compiling.
    """

    target: Target
    text: str
    argument_bytes: int
    temporary_bytes: int
    seconds: float


def compile_for(
    target: Target | str,
    function: Callable[..., Any],
    *shapes: Any,
    compiler_options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a function for a target, on any machine.

    Args:
        target: Target or its name in `TARGETS`.
        function: Function of arrays. A jitted one keeps its donated and static arguments. In it,
            `jax.default_backend()` is this machine's, not the target's.
        *shapes: Arguments: trees of arrays, or of anything with a shape and a dtype.
        compiler_options: XLA's options for this compilation.

    Returns:
        The compiled program and its memory.

    Raises:
        LoweringError: If the target is unknown, its compiler is not installed, or compilation
            fails.
    """
    target = get_target(target) if isinstance(target, str) else target
    arguments = _placed(target, shapes)
    options = {**_OPTIONS.get(target.platform, {}), **(compiler_options or {})}
    jitted: Any = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    start = time.perf_counter()
    with _abstract_device(target):
        traced = jitted.trace(*arguments)  # Errors in the function are passed on unchanged.
        try:
            compiled = traced.lower().compile(compiler_options=options)
        except Exception as error:  # Lowering rules and compilers raise many types.
            raise LoweringError(f"{target}: {_reason(error)}") from error
    memory = compiled.memory_analysis()
    return Compiled(
        target=target,
        text=compiled.as_text(),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def _placed(target: Target, shapes: Any) -> Any:
    """Return the arguments as shapes on the target's device."""
    sharding = SingleDeviceSharding(_device(target))
    leaves = jax.tree.leaves(shapes)
    if not leaves or not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "none"
        raise LoweringError(
            f"{target.name}: the arguments must be arrays or jax.ShapeDtypeStruct, at least one; "
            f"got {kinds}. Close over static values."
        )
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def get_target(name: str) -> Target:
    """Return the target of this name.

    Raises:
        LoweringError: If there is none; lists all targets.
    """
    if name not in TARGETS:
        raise LoweringError(f"target must be one of {', '.join(TARGETS)}, got {name!r}.")
    return TARGETS[name]


def _reason(error: Exception, lines: int = 4, length: int = 600) -> str:
    """Return the first lines of a compiler's message, without its stack and the module."""
    first = [line.strip() for line in str(error).splitlines() if line.strip()][:lines]
    return re.sub(r"\s+", " ", " ".join(first))[:length]


@functools.cache
def _device(target: Target) -> Any:
    """Return a device to compile for; all but the CPU are descriptions only."""
    if target.platform == "cpu":
        return jax.local_devices(backend="cpu")[0]
    find = _cuda_topology if target.gpu else _tpu_topology
    try:
        return find(target).devices[0]
    except (NotImplementedError, ImportError) as error:
        raise LoweringError(
            f"{target}: its compiler is not installed; {_WHEELS[target.platform]} installs it."
        ) from error
    except RuntimeError as error:
        raise LoweringError(f"{target}: {_reason(error)}") from error


def _abstract_device(target: Target) -> AbstractContextManager:
    """Tell Pallas the device to lower for; from JAX 0.11 on, it would look for a real one."""
    if target.gpu is None:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=target.gpu.name, num_cores=target.gpu.cores, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _cuda_topology(target: Target) -> Any:
    assert target.gpu is not None
    describe = functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        topology_name=target.name,
        topology="1x1x1",
        target_config=target.gpu.config(),
    )
    # Without a driver, the plugin's check of CUDA's libraries would keep it from registering.
    with _environment({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}):
        try:
            return describe()
        except NotImplementedError:
            # The plugin failed when JAX started, or is not installed.
            for plugin in importlib.metadata.entry_points(group="jax_plugins"):
                if plugin.name.startswith("xla_cuda"):
                    plugin.load().initialize()
                    return describe()
            raise


def _tpu_topology(target: Target) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu")
    with _environment(_LIBTPU_ENVIRONMENT):
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within a block; keep those already set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
