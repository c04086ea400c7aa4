"""What a plain `pytest` runs of many cases that go the same way."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_long(cases: Iterable[str], plain: Collection[str]) -> list[Any]:
    """Return cases as parameters; only those in `plain` are not marked `long`."""
    cases = list(cases)
    unknown = set(plain) - set(cases)
    assert not unknown, f"there are no cases {unknown}"
    return [pytest.param(name, marks=() if name in plain else pytest.mark.long) for name in cases]
