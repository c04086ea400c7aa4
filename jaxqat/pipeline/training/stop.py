"""Stopping on signals: the loop saves its state and stops after the current dispatch."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxqat.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal asked the run to stop.

    Attributes:
        signum: Number of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def raise_if_set(self) -> None:
        """Stop if a signal came. Call this only where nothing is left to save.

        Raises:
            Stopped: If a signal came.
        """
        if self.signum is not None:
            raise Stopped(self.signum)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a `StopRequest` during a block.

    The previous handlers receive a second signal, so that a hanging run can be interrupted; so does
    who had asked for the first by `signal.set_wakeup_fd`. Python delivers signals to the main
    thread only; in another thread the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
    woken = signal.set_wakeup_fd(-1)

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(woken)

    def on_signal(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        restore()

    for signum in SIGNALS:
        signal.signal(signum, on_signal)
    try:
        yield request
    finally:
        restore()
