"""Run tests on the CPU, share compiled programs between processes, and limit memory maps."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Compilation takes most of the time. Processes share programs: workers, and the commands that tests
# start. They are deleted at the end, unless the caller named a folder for them.
CACHE = "JAX_COMPILATION_CACHE_DIR"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# By default, Linux allows a process 65,530 memory maps. Each compiled kernel holds three while its
# program exists, and at the limit XLA's CPU backend dies with SIGSEGV instead of raising an error
# (jax issue 27201). One test here needs up to 20,000.
MAX_MAPS = 8_000


def pytest_configure(config: pytest.Config) -> None:
    """Make a folder for compiled programs, before workers start and inherit its name."""
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="jaxqat_compiled_")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is long as slow, so that `-m "not slow"` leaves it out, too."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


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
