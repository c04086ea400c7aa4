"""How fast networks are, measured side by side: `jaxqat benchmark`.

Engines run in turns within one process, so that what else the machine does meets all of them
alike; what they compute is compared before any of them is timed.
"""

from jaxqat.bench.checks import BenchmarkError

__all__ = ["BenchmarkError"]
