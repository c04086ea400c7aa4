"""What Linux tells of a processor decides how integer products are computed."""

import pytest

from jaxqat.pipeline import machine
from jaxqat.quant._numerics import cpu, processor

# Shortened.
XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx2 avx512_vnni amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
flags\t\t: fpu
"""
EPYC = """model name\t: AMD EPYC 7B13
flags\t\t: fpu sse4_2 avx2 vaes
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimddp i8mm
"""


@pytest.mark.parametrize(
    ("told", "has_units", "instructions"),
    [
        pytest.param(XEON, True, ("avx512_vnni", "amx_int8"), id="xeon"),
        pytest.param(EPYC, False, (), id="epyc"),
        pytest.param(GRAVITON, False, ("asimddp", "i8mm"), id="graviton"),
        pytest.param("", False, (), id="no Linux"),
    ],
)
def test_instructions_are_read_from_what_linux_tells(told, has_units, instructions, monkeypatch):
    monkeypatch.setattr(processor, "cpuinfo", lambda: told)
    processor.features.cache_clear()
    try:
        assert cpu.has_matrix_units() is has_units
        assert machine.integer_instructions() == instructions
    finally:
        processor.features.cache_clear()
