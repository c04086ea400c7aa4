"""Compilers for devices that are not there; a machine without them skips, and says so."""

import os

import pytest

from jaxqat.lowering import Target, is_available
from jaxqat.lowering.targets import get_target

WHEELS = {"cuda": "jax[cuda13]", "tpu": "jax[tpu]"}


@pytest.fixture
def target(request) -> Target:
    """The target that a test is parametrized with, by name (`indirect`)."""
    wanted = get_target(request.param)
    if not is_available(wanted):
        reason = f"the compiler for {wanted.name} is not installed: {WHEELS[wanted.platform]}"
        # Set where the compilers are there for these tests: they may not skip one another away.
        if os.environ.get("JAXQAT_REQUIRE_COMPILERS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return wanted
