"""The command `jaxqat`, which ends at once on Ctrl-C, even while it imports or compiles.

This file imports nothing but the standard library: everything else is imported by `main`, after
the signals are watched. `parser` makes the options of the commands, `dispatch` calls one.
"""

import importlib
import sys
from collections.abc import Sequence

from jaxqat.cli.interrupt import exit_on_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        Exit status: 0 if all was done, 2 for bad input, 130 or 143 after a signal, 1 otherwise.
    """
    argv = sys.argv[1:] if argv is None else argv
    hint = " Run the same command to resume." if "train" in argv[:1] else ""
    with exit_on_signals(hint):
        dispatch = importlib.import_module("jaxqat.cli.dispatch")
        return dispatch.run(argv)
