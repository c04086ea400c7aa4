"""The float network of another run: its finished FP32 stage is taken over instead of trained again.

What was trained and how stays with it: its checkpoints name their own experiment, its lines of
metrics.jsonl are its epochs, and `RunFolder.origin` says from which run they are.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.snapshots import check_data, split_state
from jaxqat.pipeline.stages import StageRun, check_finished

# Settings that the float network does not depend on: all of the first part of their keys.
OF_NO_MATTER = ("name", "quant", "qat", "evaluation_batch_size", "checkpoint")


@dataclasses.dataclass(frozen=True)
class FloatStage:
    """A finished FP32 stage that another run can go on from.

    Attributes:
        folder: The run folder that it lies in.
        steps: The checkpoints to take: the last one, and the best one if that is selected.
        origin: Name and config hash of the run that trained it.
    """

    folder: RunFolder
    steps: tuple[int, ...]
    origin: dict[str, Any]

    def copy_to(self, folder: RunFolder) -> None:
        """Make it the FP32 stage of a run that has none; the last step of it is a rename."""
        records = [r for r in self.folder.read_metrics() if r["stage"] == "fp32"]
        folder.replace_metrics("fp32", records)
        temporary, final = folder.path / ".fp32.tmp", folder.checkpoints("fp32")
        shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed.
        try:
            for step in self.steps:
                there = self.folder.checkpoints("fp32") / str(step)
                shutil.copytree(there, temporary / str(step))
            (temporary / folder.origin.name).write_text(json.dumps(self.origin) + "\n")
            final.parent.mkdir(exist_ok=True)
            if final.exists():  # Without a checkpoint, or we would not be here.
                shutil.rmtree(final)
            temporary.rename(final)
        except OSError as error:
            raise RunFolderError(f"{final}: cannot be written: {error}.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_settings(experiment: Experiment, workdir: Path) -> None:
    """Refuse a run whose float network is another than the experiment's.

    Raises:
        RunFolderError: It is no run folder, or shows every setting that differs.
    """
    theirs = RunFolder(workdir).load_config()
    differing = [
        line
        for line in configs.differences(theirs, experiment)
        if line.partition(":")[0].partition(".")[0] not in OF_NO_MATTER
    ]
    if differing:
        raise RunFolderError(
            f"{workdir}: its FP32 network is of other settings. There -> here:\n  "
            + "\n  ".join(differing)
            + "\nGive the same settings, or train FP32 anew without --from."
        )


def find_float_stage(networks: Networks, workdir: Path) -> FloatStage:
    """The finished FP32 stage of another run, its newest checkpoint verified.

    Args:
        networks: Of the experiment that is to go on with it.
        workdir: The other run's folder, of which nothing is changed.

    Raises:
        RunFolderError: It is no run folder, of other settings or other data, or its FP32 stage is
            not finished.
        CheckpointError: Its checkpoint is damaged.
    """
    check_settings(networks.experiment, workdir)
    folder = RunFolder(workdir)
    run = StageRun.of("fp32", networks, folder)
    last = check_finished(run)
    with run.open_store(read_only=True) as store:
        best = store.best_step() if networks.experiment.select == "best" else None
        steps = tuple(sorted({last} if best is None else {last, best}))
        target = split_state(run.state_shapes())
        restored = [store.restore(target, step=step) for step in steps]
    for each in restored:
        check_data(each, networks.dataset.fingerprint)
    info = restored[-1].info
    origin = {"name": info["config"]["name"], "config_hash": info["config_hash"]}
    return FloatStage(folder, steps, origin)
