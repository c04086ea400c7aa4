"""Ends the process at once when a signal comes, unless a command handles it to save its state.

Python runs its handlers in the main thread, between two of its instructions: not while XLA
compiles, and an exception that they raise can end in a crash while XLA's threads still run. So the
C handler wakes a thread, and this thread ends the process without further ado.
`stop_on_signals` of the pipeline turns this off while a run has a state to save.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
SHOW_CURSOR = "\x1b[?25h"  # A progress bar may have hidden it.


@contextmanager
def exit_on_signals(hint: str = "") -> Iterator[None]:
    """End the process with 128 + the signal's number if SIGINT or SIGTERM comes during a block.

    Only the main thread can change this; in another thread, signals stay as they are.

    Args:
        hint: What the user can do next, added to the message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_watch, args=(reader, hint), daemon=True).start()
    previous = {signum: signal.signal(signum, _ignore) for signum in SIGNALS}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        writer.close()  # The thread reads the end of the stream and returns.


def _watch(reader: socket.socket, hint: str) -> None:
    with reader:
        for byte in iter(lambda: reader.recv(1), b""):
            if byte[0] in SIGNALS:
                _exit(byte[0], hint)


def _exit(signum: int, hint: str) -> None:
    cursor = SHOW_CURSOR if os.isatty(2) else ""
    os.write(2, f"{cursor}jaxqat: {SIGNALS[signal.Signals(signum)]}.{hint}\n".encode())
    os._exit(128 + signum)


def _ignore(signum: int, frame: object) -> None:
    """Do nothing: the thread acts. Without a handler of Python's, it would not be woken."""
