"""Training of one stage of an experiment in its run folder."""

import contextlib
import dataclasses
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxqat.pipeline import config as configs
from jaxqat.pipeline.checkpoint import CheckpointError, CheckpointStore
from jaxqat.pipeline.checkpoint.store import MODEL, OPTIMIZER
from jaxqat.pipeline.data import Dataset, epoch_permutation
from jaxqat.pipeline.evaluation import Predictor
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.networks import Networks, stage_key
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.logs import RunLogs
from jaxqat.pipeline.run.snapshots import (
    Model,
    check_origin,
    join_state,
    open_store,
    restore_selected,
    split_state,
)
from jaxqat.pipeline.sentinel import Sentinel
from jaxqat.pipeline.terminal import say, tell
from jaxqat.pipeline.training import (
    DEFAULT,
    Compilation,
    Data,
    DivergedError,
    QatConfig,
    Reporter,
    StageConfig,
    StagePlan,
    StopRequest,
    TrainState,
    init_state,
    make_optimizer,
    make_schedule,
    make_step,
    run_stage,
    stop_on_signals,
)
from jaxqat.pipeline.training.progress import StageProgress
from jaxqat.quant import QuantizedModule
from jaxqat.quant._models.state import flat_state

MAX_STEPS_PER_DISPATCH = 50


@dataclasses.dataclass(frozen=True, eq=False)
class StageRun:
    """A stage of an experiment in its run folder.

    Attributes:
        name: 'fp32' or 'qat'.
        networks: The networks, the experiment and the data.
        folder: Run folder, for checkpoints and metrics.
        predictor: Computes the logits of this stage's network.
        compilation: How training steps are compiled.
    """

    name: str
    networks: Networks
    folder: RunFolder
    predictor: Predictor
    compilation: Compilation = DEFAULT

    @classmethod
    def of(
        cls,
        name: str,
        networks: Networks,
        folder: RunFolder,
        compilation: Compilation = DEFAULT,
    ) -> "StageRun":
        """Return a stage of an experiment in its run folder."""
        return cls(name, networks, folder, Predictor.of_stage(networks, name), compilation)

    @property
    def config(self) -> StageConfig:
        """The stage's settings."""
        return getattr(self.networks.experiment, self.name)

    @property
    def dataset(self) -> Dataset:
        """The data."""
        return self.networks.dataset

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training split."""
        return len(self.dataset.train) // self.config.batch_size

    @property
    def total_steps(self) -> int:
        """Training steps in the whole stage."""
        return self.config.epochs * self.steps_per_epoch

    def open_store(self, *, read_only: bool = False) -> CheckpointStore:
        """Open the stage's checkpoints."""
        return open_store(self.networks.experiment, self.folder, self.name, read_only=read_only)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the run in every checkpoint."""
        return {
            "stage": self.name,
            "config": configs.to_dict(self.networks.experiment),
            "config_hash": configs.config_hash(self.networks.experiment),
            "data": self.dataset.fingerprint,
            "source": self.networks.source,
        }

    def state_shapes(self) -> TrainState:
        """Return the training state as shapes and dtypes."""
        init = partial(init_state, optimizer=self._optimizer())
        return jax.eval_shape(init, *self.networks.shapes(self.name))

    def first_state(self, model: Model) -> TrainState:
        """Return the training state before the first step, for the network to start from."""
        init = partial(init_state, optimizer=self._optimizer())
        return jax.jit(init)(model.params, model.collections)

    def plan(self) -> StagePlan:
        """Return the work of the stage."""
        config, dataset, seed = self.config, self.dataset, self.networks.experiment.seed
        steps = {frozen: self._step(frozen) for frozen in (False, True)}
        frozen_from = config.frozen_from if isinstance(config, QatConfig) else config.epochs + 1
        # QAT continues the epoch count of FP32, so that its orders of the images are new.
        offset = 0 if self.name == "fp32" else self.networks.experiment.fp32.epochs
        limit = config.steps_per_dispatch
        if limit is None:
            limit = 1 if jax.default_backend() == "cpu" else MAX_STEPS_PER_DISPATCH
        images, labels = jax.device_put((dataset.train.images, dataset.train.labels))
        return StagePlan(
            name=self.name,
            epochs=config.epochs,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=config.batch_size,
            steps_per_dispatch=limit,
            step=lambda epoch: (steps[epoch >= frozen_from], epoch >= frozen_from),
            order=jax.jit(lambda epoch: epoch_permutation(seed, offset + epoch, len(labels))),
            data=Data(images, labels),
            key=stage_key(seed, self.name),
            learning_rate=make_schedule(
                config.optimizer,
                total_steps=self.total_steps,
                steps_per_epoch=self.steps_per_epoch,
            ),
            validate=self._validate if dataset.validation is not None else None,
            compilation=self.compilation,
            skip_failed=config.skip_failed_steps,
            ranges=self._ranges() if self._has_ranges else None,
        )

    @property
    def _has_ranges(self) -> bool:
        # Other libraries' networks of the QAT stage (`jaxqat benchmark`) have none of ours.
        module = self.networks.modules[self.name]
        return self.name == "qat" and isinstance(module, QuantizedModule)

    def _check(
        self, state: TrainState, console: Console
    ) -> Callable[[TrainState, int], None] | None:
        """Return the check of a state like this one after an epoch; None for none."""
        if not (self._has_ranges and isinstance(self.config, QatConfig) and self.config.sentinel):
            return None
        tell("qat: compiling the check of its integer products", console)
        return Sentinel(self.networks, self.compilation, state).check

    def _ranges(self) -> Callable[[TrainState], dict[str, tuple[float, float]]]:
        """Return the function that reads the range of each layer's input off a state."""
        layers = self.networks.describe()

        def ranges(state: TrainState) -> dict[str, tuple[float, float]]:
            flat = flat_state(state.collections)
            found = {layer.path: layer.covered(flat) for layer in layers}
            return {path: extent for path, extent in found.items() if extent is not None}

        return ranges

    def train(
        self,
        start: Callable[[], Model],
        *,
        console: Console,
    ) -> Model:
        """Train to the end of the stage, from its newest good checkpoint if there is one.

        Args:
            start: Returns the network to start from if there is no checkpoint.
            console: Shows the progress.

        Returns:
            The network of the last or the best checkpoint, as the experiment's `select` says.

        Raises:
            Stopped: If a signal came after the first training step; the state was saved.
        """
        with self.open_store() as store:
            restored = store.restore_newest_good(split_state(self.state_shapes()))
            if restored is None:
                state, info = self.first_state(start()), {}
            else:
                check_origin(restored, self.networks)
                state, info = join_state(restored), restored.info
            done = int(state.step)
            if done < self.total_steps:
                store.check_space(state)
                self._announce(console, done)
                self.folder.truncate_metrics(self.name, done)
                with stop_on_signals() as stop:
                    state = self._run(store, state, done, info, stop, console)
                    store.wait()
            last = Model(state.params, state.collections, int(state.step))
            if self.networks.experiment.select == "last":
                return last
            return Model.of(restore_selected(store, self.networks, self.name))

    def _run(
        self,
        store: CheckpointStore,
        state: TrainState,
        done: int,
        info: Mapping[str, Any],
        stop: StopRequest,
        console: Console,
    ) -> TrainState:
        # A copy, because the loop donates the buffers and the caller's arrays must stay valid.
        # `device_put` is not enough: on a CPU it shares the memory of a NumPy array.
        state = jax.jit(partial(jax.tree.map, jnp.copy))(state)
        progress = StageProgress(
            console,
            stage=self.name,
            epochs=self.config.epochs,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=self.config.batch_size,
            done=done,
        )
        with progress, RunLogs(self.folder, self.name, console) as logs:
            reporter = FolderReporter(self, store, progress, logs, console)
            plan = dataclasses.replace(self.plan(), check=self._check(state, console))
            return run_stage(
                plan,
                state,
                reporter=reporter,
                stop=stop,
                epoch_seconds=info.get("epoch_seconds", 0.0),
                epoch_skipped=info.get("epoch_skipped", 0),
            )

    def _announce(self, console: Console, done: int) -> None:
        if done:
            epoch = done // self.steps_per_epoch
            tell(
                f"{self.name}: resumed at step {done} of {self.total_steps} (epoch {epoch + 1}).",
                console,
            )
        dropped = len(self.dataset.train) % self.config.batch_size
        if dropped:
            tell(
                f"{self.name}: the last, partial batch of each epoch is dropped: "
                f"{dropped} of {len(self.dataset.train)} images.",
                console,
            )

    def _optimizer(self):
        return make_optimizer(
            self.config.optimizer,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _step(self, frozen: bool) -> Callable:
        return make_step(
            forward=self.networks.forward(self.name, frozen=frozen),
            prepare=self.networks.prepare,
            optimizer=self._optimizer(),
            batch_size=self.config.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            label_smoothing=self.config.label_smoothing,
            skip_failed=self.config.skip_failed_steps,
        )

    def _validate(self, state: TrainState) -> dict[str, float]:
        split = self.dataset.validation
        if split is None:
            return {}
        variables = {"params": state.params, **state.collections}
        logits = self.predictor.logits(split, variables)
        if not np.isfinite(logits).all():
            raise DivergedError(
                f"{self.name}: logits of the validation split are infinite or NaN after step "
                f"{int(state.step)}; earlier checkpoints are good."
            )
        scores = classification_metrics(split.labels, logits, self.dataset.class_names)
        return {"validation_loss": scores.loss, "validation_accuracy": scores.accuracy}


def check_finished(run: StageRun) -> int:
    """Return the last step of a finished stage.

    Raises:
        RunFolderError: If the stage has no checkpoint, or is not finished.
    """
    folder, name = run.folder, run.name
    folder.check_checkpoints(name)
    with run.open_store(read_only=True) as store:
        last = max(store.steps(), default=0)
    if last < run.total_steps:
        raise RunFolderError(
            f"{folder.path}: its {name.upper()} stage is at step {last} of {run.total_steps}. "
            "Repeat its `jaxqat train` to finish it."
        )
    return last


@dataclasses.dataclass(frozen=True, eq=False)
class FolderReporter(Reporter):
    """Writes metrics and checkpoints to the run folder, and prints progress."""

    run: StageRun
    store: CheckpointStore
    progress: StageProgress
    logs: RunLogs
    console: Console

    def compiling(self, *, frozen: bool) -> None:
        """Print it."""
        self.progress.compiling(frozen=frozen)

    def advance(self, steps: int) -> None:
        """Move the progress bar."""
        self.progress.advance(steps)

    def skipped(self, epoch: int, steps: Sequence[int]) -> None:
        """Print a warning that names the steps."""
        of = f"{len(steps)} of {self.run.steps_per_epoch} steps of epoch {epoch}"
        say(
            f"warning: {self.run.name}: skipped {of}, as their loss, gradient or new weights are "
            f"infinite or NaN: {reprlib.repr(steps).strip('[]')}.",
            self.console,
            style="yellow",
        )

    def last_saved(self) -> int | None:
        """Return the step of the newest checkpoint."""
        with contextlib.suppress(CheckpointError):  # One that cannot be written is not listed.
            self.store.wait()
        return max(self.store.steps(), default=None)

    def epoch(self, record: dict[str, Any]) -> None:
        """Add the epoch to metrics.jsonl and the other logs, and print it."""
        self.run.folder.append_metrics(record)
        self.logs.epoch(record)
        self.progress.epoch(record)

    def save(
        self,
        state: TrainState,
        record: dict[str, Any] | None,
        *,
        epoch_seconds: float,
        epoch_skipped: int,
        stopping: bool,
    ) -> None:
        """Write a checkpoint if one is due."""
        step, every = int(state.step), self.run.networks.experiment.checkpoint.every_epochs
        is_last = step == self.run.total_steps
        if stopping or is_last or record is None or record["epoch"] % every == 0:
            extra = {
                **self.run.identity(),
                "epoch_seconds": epoch_seconds,
                "epoch_skipped": epoch_skipped,
            }
            parts = split_state(state)
            self.store.save(
                step, model=parts[MODEL], optimizer=parts[OPTIMIZER], record=record, extra=extra
            )
