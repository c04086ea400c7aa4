"""Progress of a stage in the terminal: a bar with images/s and ETA, and a line per epoch.

After the first steps a line says how long the stage will take.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console

from jaxqat.analysis._text import duration
from jaxqat.pipeline.progress import Pace, make_bar
from jaxqat.pipeline.terminal import QuietConsole, tell

# Seconds of training before its speed is known well enough, and how long the rest of a stage must
# take to be worth a line.
MEASURED_SECONDS, WORTH_SECONDS = 3.0, 10.0


class StageProgress:
    """The progress bar of a stage, and a line per epoch; without a terminal, only lines.

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
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._pace = Pace(epochs * steps_per_epoch, done)
        self._estimated = False
        self._bar = make_bar(stage, None if isinstance(console, QuietConsole) else console)
        self._task = self._bar.add_task(
            stage, total=epochs * steps_per_epoch, completed=done, rate="steps, - images"
        )

    def __enter__(self) -> "StageProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def compiling(self, *, frozen: bool) -> None:
        """Say that a training step is compiled, which can take minutes."""
        which = "with frozen ranges" if frozen else ""
        self._say(f"{self._stage}: compiling the training step {which}".rstrip())

    def advance(self, steps: int) -> None:
        """Move the bar by `steps` training steps."""
        self._pace.advance(steps)
        self._estimate()
        rate, epoch = self._pace.rate, self._pace.done // self._steps_per_epoch + 1
        shown = "-" if rate is None else f"{rate * self._batch_size:,.0f}"
        where = f"steps, epoch {min(epoch, self._epochs)} of {self._epochs}"
        self._bar.update(self._task, advance=steps, rate=f"{where}, {shown} images")
        if not self._console.is_terminal and self._pace.due():
            line = self._pace.line("steps", scale=self._batch_size, scaled="images")
            self._say(f"{self._stage}: {line}")

    def _estimate(self) -> None:
        """Print once how long the rest will take."""
        rest = self._pace.rest()
        if self._estimated or rest is None or self._pace.seconds < MEASURED_SECONDS:
            return
        self._estimated = True
        if rest >= WORTH_SECONDS:
            steps = self._pace.total - self._pace.done
            self._say(f"{self._stage}: about {duration(rest)} for the remaining {steps:,} steps")

    def _say(self, text: str) -> None:
        tell(text, self._console)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Print the line of an epoch."""
        validation = ""
        if record["validation_accuracy"] is not None:
            validation = (
                f", validation loss {record['validation_loss']:.4f} "
                f"accuracy {100 * record['validation_accuracy']:.2f} %"
            )
        self._say(
            f"{self._stage} epoch {record['epoch']}/{self._epochs}: loss {record['loss']:.4f} "
            f"accuracy {100 * record['accuracy']:.2f} %{validation}, "
            f"{record['images_per_s']:,.0f} images/s, {record['seconds']:.1f} s"
            + (", ranges and batch norm frozen" if record["frozen"] else "")
        )
