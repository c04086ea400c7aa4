"""Reports of a failed read that come too late to matter, and how they are kept from the terminal.

Orbax reads all arrays of a checkpoint at once. If one cannot be read it closes its event loop, and
for each other array a thread of TensorStore still reports to it: a traceback of 'Event loop is
closed' each, some ninety lines around the one that says what is damaged.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CLOSED = "Event loop is closed"


@contextmanager
def late_reports_dropped() -> Iterator[None]:
    """Drop the reports of a read that fails in this block, also those that come after it.

    The filter goes when the block ends well. It stays after a failure, for how late the reports
    come is not known; everything else passes it.
    """
    previous = sys.unraisablehook

    def without_closed_loops(report: Any) -> None:
        if not (isinstance(report.exc_value, RuntimeError) and str(report.exc_value) == CLOSED):
            previous(report)

    sys.unraisablehook = without_closed_loops
    yield
    sys.unraisablehook = previous
