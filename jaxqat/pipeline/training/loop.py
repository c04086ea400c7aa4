"""The training loop of a stage, from any training step to its end.

The loop knows neither the model nor the files: it gets them as functions (`StagePlan`) and as a
`Reporter`. Within an epoch the host only dispatches, at most `MAX_IN_FLIGHT` calls ahead of the
device; sums stay on the device and are read once per epoch.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxqat.errors import RunError
from jaxqat.pipeline.training.compilation import DEFAULT, Compilation
from jaxqat.pipeline.training.step import (
    Data,
    StepReport,
    TrainState,
    dispatch_length,
    make_dispatch,
)
from jaxqat.pipeline.training.stop import StopRequest

# Enough to keep a device busy while the host prepares the next call, and few enough for exact
# progress and a quick response to signals.
MAX_IN_FLIGHT = 2

Record = dict[str, Any]
"""One line of metrics.jsonl."""


class DivergedError(RunError):
    """The loss or the state is not finite; earlier checkpoints are good."""


class Reporter:
    """Receives progress and states from the loop; this one keeps nothing."""

    def compiling(self, *, frozen: bool) -> None:
        """Note that a training step is compiled, with or without frozen ranges."""

    def advance(self, steps: int) -> None:
        """Count `steps` more training steps as done."""

    def skipped(self, epoch: int, steps: Sequence[int]) -> None:
        """Report the steps of an epoch that were skipped, because they were not finite."""

    def last_saved(self) -> int | None:
        """Return the step of the newest state that was saved; None if there is none."""

    def epoch(self, record: Record) -> None:
        """Report the end of an epoch."""

    def save(
        self,
        state: TrainState,
        record: Record | None,
        *,
        epoch_seconds: float,
        epoch_skipped: int,
        stopping: bool,
    ) -> None:
        """Receive a state of NumPy arrays, which must be saved if the run is `stopping`.

        Without a record, the state is within an epoch, which took `epoch_seconds` so far and in
        which `epoch_skipped` steps were skipped.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The work of a stage.

    Attributes:
        name: 'fp32' or 'qat'.
        epochs: Number of epochs.
        steps_per_epoch: Whole batches in an epoch.
        batch_size: Images per training step.
        steps_per_dispatch: Largest number of training steps per device call.
        step: Returns the training step (`make_step`) of an epoch, counted from 1, and whether
            ranges and batch-norm statistics are frozen in it. Equal steps must be one object, so
            that each is compiled once.
        order: Returns the order of the images in an epoch, counted from 1.
        data: The training split on the device.
        key: The stage's random key.
        learning_rate: The schedule, for the record only.
        ranges: Returns the activation ranges, (low, high) by layer; None for a network without.
        check: Checks the state after an epoch, given its number, and raises if it is wrong.
        validate: Returns 'validation_loss' and 'validation_accuracy'; None without that split.
        compilation: How training steps are compiled.
        skip_failed: Whether the steps leave out those that are not finite, as `make_step` does.
    """

    name: str
    epochs: int
    steps_per_epoch: int
    batch_size: int
    steps_per_dispatch: int
    step: Callable[[int], tuple[Callable, bool]]
    order: Callable[[int], Array]
    data: Data
    key: Array
    learning_rate: Callable[[int], Any]
    validate: Callable[[TrainState], dict[str, float]] | None
    ranges: Callable[[TrainState], dict[str, tuple[float, float]]] | None = None
    check: Callable[[TrainState, int], None] | None = None
    compilation: Compilation = DEFAULT
    skip_failed: bool = False


class _Dispatcher:
    """Compiles each pair of step function and number of steps once."""

    def __init__(self, stage: StagePlan, reporter: Reporter):
        self.stage, self.reporter = stage, reporter
        self.length = dispatch_length(stage.steps_per_epoch, stage.steps_per_dispatch)
        self.compiled: dict[tuple[Callable, int], Callable] = {}

    def calls(
        self, step: Callable, position: int, state: TrainState, order: Array, frozen: bool
    ) -> list[tuple[int, Callable]]:
        """Return the calls from `position` to the end of the epoch, with their numbers of steps.

        They are compiled ahead of time: an epoch's time must not include compilation.
        """
        full, rest = divmod(self.stage.steps_per_epoch - position, self.length)
        lengths = [self.length] * full + [rest] * (rest > 0)
        found = {n: self._get(step, n, state, order, frozen) for n in sorted(set(lengths))}
        return [(length, found[length]) for length in lengths]

    def _get(
        self, step: Callable, length: int, state: TrainState, order: Array, frozen: bool
    ) -> Callable:
        if (step, length) not in self.compiled:
            self.reporter.compiling(frozen=frozen)
            self.compiled[step, length] = self.stage.compilation.compile(
                make_dispatch(step, length), state, self.stage.data, order, self.stage.key
            )
        return self.compiled[step, length]


def run_stage(
    stage: StagePlan,
    state: TrainState,
    *,
    reporter: Reporter,
    stop: StopRequest,
    epoch_seconds: float = 0.0,
    epoch_skipped: int = 0,
) -> TrainState:
    """Train from the state's step to the end of the stage.

    Args:
        stage: Work of the stage.
        state: State to start from; its buffers are donated.
        reporter: Receives progress and the states to save.
        stop: Checked after each dispatch; listens to signals once the first ones are compiled.
        epoch_seconds: Time already spent on the unfinished epoch of `state`.
        epoch_skipped: Steps of that epoch that were skipped.

    Raises:
        DivergedError: If a loss, a gradient or the state is not finite, or if each step of an
            epoch was skipped for that.
        Stopped: If `stop` was set; the state was saved.
    """
    dispatcher = _Dispatcher(stage, reporter)
    done = int(state.step)
    for epoch in range(done // stage.steps_per_epoch + 1, stage.epochs + 1):
        position, done = done % stage.steps_per_epoch, 0
        step, frozen = stage.step(epoch)
        order = stage.order(epoch)
        calls = dispatcher.calls(step, position, state, order, frozen)
        stop.listen()
        ran = _run_epoch(stage, calls, state, order, reporter, stop, epoch)
        state = ran.state
        epoch_seconds += ran.seconds
        epoch_skipped += len(ran.skipped)
        saved = jax.device_get(state)
        check_finite(stage, saved, epoch, reporter)
        record = None
        if saved.step == epoch * stage.steps_per_epoch:
            if epoch_skipped == stage.steps_per_epoch:
                what = "the loss or its gradient was infinite or NaN in every step"
                raise _diverged(stage, what, saved, epoch, reporter, int(saved.step))
            if stage.check is not None:
                stage.check(state, epoch)
            record = _record(stage, saved, ran, epoch, frozen, epoch_seconds, epoch_skipped)
            if stage.validate is not None:
                record.update(stage.validate(state))
            reporter.epoch(record)
            epoch_seconds, epoch_skipped = 0.0, 0
        stopping = stop.signum is not None
        reporter.save(
            saved,
            record,
            epoch_seconds=epoch_seconds,
            epoch_skipped=epoch_skipped,
            stopping=stopping,
        )
        stop.raise_if_set()
    return state


class _Ran(NamedTuple):
    """What was trained of an epoch: the state after it, the last step's report, skipped steps."""

    state: TrainState
    report: StepReport
    seconds: float
    images: int
    skipped: list[int]


def _run_epoch(
    stage: StagePlan,
    calls: list[tuple[int, Callable]],
    state: TrainState,
    order: Array,
    reporter: Reporter,
    stop: StopRequest,
    epoch: int,
) -> _Ran:
    """Train to the end of an epoch or to a stop.

    Raises:
        DivergedError: If the loss or gradient of a step is not finite.
    """
    in_flight: deque[tuple[int, StepReport]] = deque()
    skipped: list[int] = []

    def wait_for_oldest() -> None:
        length, report = in_flight.popleft()
        failed = [int(number) for number in np.ravel(report.failed) if number]
        if failed and not stage.skip_failed:
            what = f"the loss or its gradient became infinite or NaN in step {failed[0]}"
            raise _diverged(stage, what, jax.device_get(state), epoch, reporter, failed[0])
        skipped.extend(failed)
        reporter.advance(length)

    report: Any = None  # There is at least one dispatch.
    start, images = time.perf_counter(), 0
    for length, call in calls:
        state, report = call(state, stage.data, order, stage.key)
        images += length * stage.batch_size
        in_flight.append((length, report))
        if len(in_flight) > MAX_IN_FLIGHT:
            wait_for_oldest()
        if stop.signum is not None:
            break
    while in_flight:
        wait_for_oldest()
    seconds = time.perf_counter() - start
    if skipped:
        reporter.skipped(epoch, skipped)
    return _Ran(state, report, seconds, images, skipped)


def check_finite(stage: StagePlan, state: TrainState, epoch: int, reporter: Reporter) -> None:
    """Check that all numbers of a state are finite.

    Raises:
        DivergedError: If one is infinite or NaN; see `_diverged`.
    """
    leaves = (np.asarray(leaf) for leaf in jax.tree.leaves(state))
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        what = f"the weights or statistics became infinite or NaN before step {state.step + 1}"
        raise _diverged(stage, what, state, epoch, reporter, int(state.step))


def _diverged(
    stage: StagePlan, what: str, state: TrainState, epoch: int, reporter: Reporter, step: int
) -> DivergedError:
    """Return the error that says what happened, where, at which learning rate, and what is left."""
    collections = {"params": state.params, **state.collections}
    nans = {name: count for name, tree in collections.items() if (count := _nans(tree))}
    counted = ", ".join(f"{count:,} in {name}" for name, count in nans.items()) or "none"
    last = reporter.last_saved()
    good = (
        "This stage has no checkpoint yet"
        if last is None
        else f"The checkpoint of step {last} is good"
    )
    skip = f", or set {stage.name}.skip_failed_steps to true to leave such steps out"
    rate = float(stage.learning_rate(max(step - 1, 0)))
    return DivergedError(
        f"{stage.name}: {what}, in epoch {epoch}, at learning rate {rate:.3g} (numbers that are "
        f"NaN now: {counted}). {good}. Try a smaller {stage.name}.optimizer.learning_rate or a "
        f"warm-up{'' if stage.skip_failed else skip}."
    )


def _nans(tree: Any) -> int:
    leaves = map(np.asarray, jax.tree.leaves(tree))
    return sum(int((leaf != leaf).sum()) for leaf in leaves)  # Only NaN differs from itself.


def _record(
    stage: StagePlan,
    state: TrainState,
    ran: _Ran,
    epoch: int,
    frozen: bool,
    seconds: float,
    skipped: int,
) -> Record:
    steps, norm = stage.steps_per_epoch - skipped, float(ran.report.gradient_norm)
    return {
        "stage": stage.name,
        "epoch": epoch,
        "step": epoch * stage.steps_per_epoch,
        # That of the epoch's last update; the schedule counts the updates before it.
        "learning_rate": float(stage.learning_rate(epoch * stage.steps_per_epoch - 1)),
        "gradient_norm": norm if math.isfinite(norm) else None,  # Of that update, too.
        "loss": float(state.loss_sum) / steps,
        "accuracy": int(state.correct) / (steps * stage.batch_size),
        "validation_loss": None,
        "validation_accuracy": None,
        "images_per_s": ran.images / ran.seconds,
        "seconds": seconds,
        "frozen": frozen,
        "ranges": {} if stage.ranges is None else stage.ranges(state),
    }
