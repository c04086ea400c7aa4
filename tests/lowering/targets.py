"""The targets of parametrized tests; all but the CPU need an extra wheel."""

from collections.abc import Iterable

import pytest

GPUS = ("sm_75", "sm_80", "sm_90")
TPUS = ("tpu_v5e", "tpu_v6e")


def for_targets(names: Iterable[str]) -> pytest.MarkDecorator:
    """Return the mark that runs a test once for each target."""
    marks = {"cpu": ()}
    params = [pytest.param(name, marks=marks.get(name, pytest.mark.lowering)) for name in names]
    return pytest.mark.parametrize("target", params, indirect=True)


on_all = for_targets(("cpu", *GPUS, *TPUS))
