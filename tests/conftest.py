"""Run tests on the CPU, even on a machine with a GPU, and limit the memory maps of the process."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# By default, Linux allows a process 65,530 memory maps. Each compiled kernel holds three while its
# program exists, and at the limit XLA's CPU backend dies with SIGSEGV instead of raising an error
# (jax issue 27201). One test here needs up to 20,000.
MAX_MAPS = 8_000


def memory_maps() -> int:
    """Count the memory maps of this process; 0 if the system does not list them."""
    path = Path("/proc/self/maps")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def release_programs() -> None:
    """Drop every compiled program without other references."""
    import jax  # Only after the platform is set.

    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def programs_are_released():
    yield
    release_programs()


@pytest.fixture(autouse=True)
def maps_stay_few():
    yield
    if memory_maps() > MAX_MAPS:
        release_programs()
