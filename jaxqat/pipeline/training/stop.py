"""Stopping on signals: the loop saves its state and stops after the current dispatch.

Everything else that a command does can be ended at any moment, since files are written atomically.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxqat.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal asked the training to stop.

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
    def nothing_to_save(self) -> Iterator[None]:
        """During a block, let signals act at once if they would without a request."""
        yield


class _FromSignals(StopRequest):
    """A request that SIGINT and SIGTERM set, once; a second signal goes to the handlers before."""

    def install(self) -> None:
        self._previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._woken = signal.set_wakeup_fd(-1)
        for signum in SIGNALS:
            signal.signal(signum, self._on_signal)

    def restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._woken)

    @contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        self.raise_if_set()
        self.restore()
        try:
            yield
        finally:
            self.install()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.restore()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a `StopRequest` during a block.

    The previous handlers receive a second signal, so that a hanging run can be interrupted; so does
    who had asked for the first by `signal.set_wakeup_fd`. Python delivers signals to the main
    thread only; in another thread the request is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    request = _FromSignals()
    request.install()
    try:
        yield request
    finally:
        request.restore()
