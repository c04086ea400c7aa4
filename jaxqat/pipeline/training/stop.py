"""Signals as a request: the loop stops at the next dispatch boundary, with its state saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxqat.errors import JaxqatError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(JaxqatError):
    """Raised where a signal stopped the run; the state has been saved.

    Attributes:
        signum: The signal; a shell expects the exit status 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def raise_if_set(self) -> None:
        """Stop here, at a place where nothing is left to be saved.

        Raises:
            Stopped: If a signal came.
        """
        if self.signum is not None:
            raise Stopped(self.signum)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a `StopRequest` while the block runs.

    A second signal acts as if nobody listened, so that a run that hangs can still be interrupted.
    Python delivers signals to the main thread only; elsewhere the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {signum: signal.getsignal(signum) for signum in SIGNALS}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def on_signal(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        restore()

    for signum in SIGNALS:
        signal.signal(signum, on_signal)
    try:
        yield request
    finally:
        restore()
