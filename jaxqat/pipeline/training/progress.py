"""Progress of a stage in the terminal: a bar with images/s and ETA, and a line per epoch.

After the first steps a line says how long the stage will take.
"""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxqat.analysis._text import duration

# Seconds of training before its speed is known well enough, and how long the rest of a stage must
# take to be worth a line.
MEASURED_SECONDS, WORTH_SECONDS = 3.0, 10.0


class StageProgress:
    """The progress bar of a stage, and a line per epoch; without a terminal, only the lines.

    A context manager: the bar is removed after the block, the lines stay.
    """

    def __init__(
        self,
        console: Console,
        *,
        stage: str,
        epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        done: int,
    ):
        self._console, self._stage, self._epochs = console, stage, epochs
        self._batch_size = batch_size
        self._done, self._total = done, epochs * steps_per_epoch
        self._first: tuple[float, int] | None = None  # Time and steps at the first report.
        self._estimated = False
        self._progress = Progress(
            TextColumn(f"{stage} {{task.fields[epoch]}}/{epochs}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, {task.fields[rate]} images/s, ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._steps_per_epoch = steps_per_epoch
        self._task = self._progress.add_task(
            stage,
            total=epochs * steps_per_epoch,
            completed=done,
            epoch=min(done // steps_per_epoch + 1, epochs),
            rate="-",
        )

    def __enter__(self) -> "StageProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def advance(self, steps: int) -> None:
        """Move the bar by `steps` training steps."""
        self._done += steps
        self._estimate()
        self._progress.advance(self._task, steps)
        task = self._progress.tasks[0]
        if task.speed:
            rate = f"{task.speed * self._batch_size:,.0f}"
            epoch = min(int(task.completed) // self._steps_per_epoch + 1, self._epochs)
            self._progress.update(self._task, epoch=epoch, rate=rate)

    def _estimate(self) -> None:
        """Print once how long the rest will take, from the steps after the first report.

        The first report comes after steps that were slow for reasons of their own.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = now, self._done
        seconds, steps = now - self._first[0], self._done - self._first[1]
        if self._estimated or seconds < MEASURED_SECONDS or not steps:
            return
        self._estimated, rest = True, self._total - self._done
        if rest * seconds / steps >= WORTH_SECONDS:
            self._console.print(
                f"{self._stage}: about {duration(rest * seconds / steps)} for the remaining "
                f"{rest:,} steps",
                highlight=False,
                soft_wrap=True,
            )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Print the line of an epoch."""
        validation = ""
        if record["validation_accuracy"] is not None:
            validation = (
                f", validation loss {record['validation_loss']:.4f} "
                f"accuracy {100 * record['validation_accuracy']:.2f} %"
            )
        self._console.print(
            f"{self._stage} epoch {record['epoch']}/{self._epochs}: loss {record['loss']:.4f} "
            f"accuracy {100 * record['accuracy']:.2f} %{validation}, "
            f"{record['images_per_s']:,.0f} images/s, {record['seconds']:.1f} s"
            + (", ranges and batch norm frozen" if record["frozen"] else ""),
            highlight=False,
            soft_wrap=True,
        )
