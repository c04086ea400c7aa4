"""This machine's processor. Needs no JAX."""

import platform
import re

from jaxqat.quant._numerics.processor import cpuinfo, features

# Features that multiply 8-bit integers, as Linux names them.
INSTRUCTIONS = ("avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")


def processor() -> str:
    """Return model, if known, and architecture of the processor."""
    model = re.search(r"^model name\s*: (.*)$", cpuinfo(), re.MULTILINE)
    return f"{model[1] if model else platform.processor() or 'unknown'} ({platform.machine()})"


def integer_instructions() -> tuple[str, ...]:
    """Return the processor's features that multiply 8-bit integers, as far as Linux tells."""
    return tuple(name for name in INSTRUCTIONS if name in features())
