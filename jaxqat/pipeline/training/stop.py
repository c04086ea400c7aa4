"""Stopping on signals: the loop saves its state and stops after the current dispatch.

What a command does otherwise needs no saving: the next command does it again.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxqat.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal asked the work to stop.

    Attributes:
        signum: Number of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def listen(self) -> None:
        """Turn signals into this request from now on, if it is one of `stop_on_signals`."""

    def raise_if_set(self) -> None:
        """Stop if a signal came. Call this only where nothing is left to save.

        Raises:
            Stopped: If a signal came.
        """
        if self.signum is not None:
            raise Stopped(self.signum)


class _FromSignals(StopRequest):
    """A request that SIGINT and SIGTERM set, once; a second signal goes to the handlers before."""

    def __init__(self) -> None:
        super().__init__()
        self._is_listening = False

    def listen(self) -> None:
        if self._is_listening or threading.current_thread() is not threading.main_thread():
            return
        self._is_listening = True
        self._previous = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        self._woken = signal.set_wakeup_fd(-1)

    def restore(self) -> None:
        if not self._is_listening:
            return
        self._is_listening = False
        signal.set_wakeup_fd(self._woken)  # First: the handlers before may rely on it.
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.restore()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM set a `StopRequest`, from its `listen` to the end of a block.

    The previous handlers receive a second signal, so that a hanging run can be interrupted; so does
    who had asked for the first by `signal.set_wakeup_fd`. Python delivers signals to the main
    thread only; in another thread the request is never set.

    Raises:
        Stopped: At the end of the block, if a signal came.
    """
    request = _FromSignals()
    try:
        yield request
    finally:
        request.restore()
    request.raise_if_set()
