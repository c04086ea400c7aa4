"""Tests run on the CPU, whatever else the machine has, and never touch a user's cache."""

import gc
import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(autouse=True, scope="module")
def programs_are_given_back():
    """Each compiled program holds memory, and memory maps, of which Linux allows 65,530.

    All that the tests compile together would have more.
    """
    yield
    import jax  # Not before the platform is set.

    jax.clear_caches()
    gc.collect()
