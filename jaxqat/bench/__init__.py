"""Measure and compare the speed of networks: `jaxqat benchmark`.

Engines alternate within one process, so that other load on the machine affects all alike. Their
results are compared before any engine is timed.
"""

from jaxqat.bench.checks import BenchmarkError

__all__ = ["BenchmarkError"]
