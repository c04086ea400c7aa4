"""Progress of long work: in a terminal a bar with rate and ETA, elsewhere plain lines."""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxqat.analysis._text import duration
from jaxqat.pipeline.terminal import QuietConsole, tell

LINE_SECONDS = 15.0  # Between two lines of one work.

Batch = TypeVar("Batch", bound=Sized)


class Pace:
    """Counts what is done, from the first report on: what comes before it is slow by compilation.

    Attributes:
        done: Number of things that are done.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done = total, done
        self._first: tuple[float, int] | None = None
        self._line = 0.0

    def advance(self, count: int) -> None:
        """Count `count` more as done."""
        self.done += count
        if self._first is None:
            self._line = time.monotonic()
            self._first = self._line, self.done

    @property
    def seconds(self) -> float:
        """Seconds since the first report."""
        return 0.0 if self._first is None else time.monotonic() - self._first[0]

    @property
    def rate(self) -> float | None:
        """Things per second; None if it is not known yet."""
        steps = self.done - (self.done if self._first is None else self._first[1])
        return steps / self.seconds if steps and self.seconds > 0 else None

    def rest(self) -> float | None:
        """Return the seconds that are left; None if they are not known yet."""
        return None if self.rate is None else (self.total - self.done) / self.rate

    def due(self) -> bool:
        """Return whether a line is due: the last one is long ago, and this is not the end."""
        now = time.monotonic()
        if self.done >= self.total or now - self._line < LINE_SECONDS or self.rate is None:
            return False
        self._line = now
        return True

    def line(self, unit: str, *, scale: int = 1, scaled: str = "") -> str:
        """Return what is done, how fast, and how long the rest takes.

        Args:
            unit: Name of the things.
            scale: Of what the rate counts, how many make one of the things.
            scaled: Name of what the rate counts; by default that of the things.
        """
        rate, rest = self.rate or 0.0, self.rest() or 0.0
        return (
            f"{self.done:,} of {self.total:,} {unit}, {rate * scale:,.0f} {scaled or unit}/s, "
            f"{duration(rest)} left"
        )


class Work:
    """A piece of work that says what it is, and how far it is; a context manager.

    In a terminal, a bar with rate and ETA stands below that line until the end of the block;
    elsewhere a line follows every 15 seconds. Without a console, or on a quiet one, it shows
    nothing.
    """

    def __init__(self, console: Console | None, what: str, total: int, unit: str = "images"):
        self._console, self._what, self._unit = console, what, unit
        self._pace = Pace(total)
        visible = None if isinstance(console, QuietConsole) else console
        self._lines = visible is not None and not visible.is_terminal
        self._bar = make_bar(what, visible)
        self._task = self._bar.add_task(what, total=total, rate=f"- {unit}")

    def __enter__(self) -> "Work":
        tell(self._what, self._console)
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, count: int) -> None:
        """Count `count` more as done."""
        self._pace.advance(count)
        rate = self._pace.rate
        shown = "-" if rate is None else f"{rate:,.0f}"
        self._bar.update(self._task, advance=count, rate=f"{shown} {self._unit}")
        if self._lines and self._pace.due():
            tell(f"{self._what}: {self._pace.line(self._unit)}", self._console)

    def track(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches; one is done when the next one is asked for."""
        for batch in batches:
            yield batch
            self.advance(len(batch))


Track = Callable[[Iterable[Batch]], Iterator[Batch]]
"""Passes batches on and counts them, as `Work.track`; `iter` does not count."""


def make_bar(text: str, console: Console | None) -> Progress:
    """Return a progress bar of tasks with a `rate`, shown if the console is a terminal."""
    return Progress(
        TextColumn(text, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}/s, ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console is None or not console.is_terminal,
    )
