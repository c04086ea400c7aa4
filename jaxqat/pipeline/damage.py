"""Damaged checkpoints of a finished run: find them, and move them aside to train again."""

import dataclasses
from collections.abc import Iterator

from jaxqat.pipeline.checkpoint import CheckpointStore, DamagedCheckpointError
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.results import TRAINED_STAGES
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import open_store, repair_hint


def check_undamaged(folder: RunFolder, experiment: Experiment) -> None:
    """Check the checkpoints that a finished run is restored from: of each stage, the selected one.

    A stage whose checkpoints were all deleted is left out: that was done on purpose.

    Raises:
        DamagedCheckpointError: One is damaged or missing; names it and how to repair the run.
    """
    for stage in _stages(folder):
        with open_store(experiment, folder, stage, read_only=True) as store:
            for problem in _problems(folder, store, experiment, stage):
                raise DamagedCheckpointError(f"{problem} {repair_hint(folder)}")


def repair(folder: RunFolder, experiment: Experiment) -> list[str]:
    """Move damaged checkpoints aside; if there are any, mark the run as unfinished.

    Returns:
        What is damaged; `train` then trains from the last good checkpoints on.
    """
    found = []
    for stage in _stages(folder):
        with open_store(experiment, folder, stage) as store:
            found += _problems(folder, store, experiment, stage)
            for step in store.steps():
                try:
                    store.check(step)
                except DamagedCheckpointError as error:
                    store.move_aside(step)
                    found += [str(error)] if str(error) not in found else []
    results = folder.find_results()
    if found and results is not None:  # As `quantize` leaves them before QAT.
        without = {"qat": None, "integer": None, "conversion_error": None, "verify": None}
        folder.write_results(dataclasses.replace(results, **without))
    return found


def _stages(folder: RunFolder) -> list[str]:
    return [stage for stage in TRAINED_STAGES if folder.has_checkpoints(stage)]


def _problems(
    folder: RunFolder, store: CheckpointStore, experiment: Experiment, stage: str
) -> Iterator[str]:
    """Yield what is wrong with the last checkpoint of a finished stage, and with the best one."""
    steps = store.steps()
    last = max((r["step"] for r in folder.read_metrics() if r["stage"] == stage), default=0)
    if last and last not in steps:
        yield f"{store.directory / str(last)} is damaged: it is missing or incomplete."
    best = store.best_step() if experiment.select == "best" else None
    for step in sorted({best or last} & set(steps)):
        try:
            store.check(step)
        except DamagedCheckpointError as error:
            yield str(error)
