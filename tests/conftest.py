"""Tests run on the CPU, whatever else the machine has, and never touch a user's cache."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Linux allows a process 65,530 memory maps by default. A compiled kernel holds three of them while
# its program lives, and at the limit XLA's CPU backend dies with SIGSEGV instead of raising an
# error (jax issue 27201). One test here holds up to 20,000.
MAX_MAPS = 8_000


def memory_maps() -> int:
    """Count the memory maps of this process; 0 where the system does not list them."""
    path = Path("/proc/self/maps")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def release_programs() -> None:
    """Drop every compiled program that nothing else holds."""
    import jax  # Not before the platform is set.

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
