"""What Linux tells of this processor."""

import functools
import re
from pathlib import Path


def cpuinfo() -> str:
    """Return what Linux tells of the processor; nothing on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


@functools.cache
def features() -> tuple[str, ...]:
    """Return the names of the processor's instruction sets, as Linux knows them."""
    line = re.search(r"^(?:flags|Features)\s*: (.*)$", cpuinfo(), re.MULTILINE)
    return tuple(line[1].split()) if line else ()
