"""Skip tests of a target whose compiler is not installed, with the reason."""

import os

import pytest

from jaxqat.lowering import LoweringError, Target
from jaxqat.lowering.targets import _device, get_target

WHEELS = {"cuda": "jax[cuda13]", "tpu": "jax[tpu]"}


def is_available(target: Target) -> bool:
    """Whether the compiler for a target is installed."""
    try:
        _device(target)
    except LoweringError:
        return False
    return True


@pytest.fixture
def target(request) -> Target:
    """Return the target that a test is parametrized with by name (`indirect`)."""
    wanted = get_target(request.param)
    if not is_available(wanted):
        reason = f"the compiler for {wanted.name} is not installed: {WHEELS[wanted.platform]}"
        # CI installs the compilers and sets this variable, so that no test is skipped unnoticed.
        if os.environ.get("JAXQAT_REQUIRE_COMPILERS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return wanted
