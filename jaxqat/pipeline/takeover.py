"""Start a run from the finished FP32 stage of another run.

The stage keeps its history: its checkpoints name the experiment that trained them, its lines of
metrics.jsonl are copied, and `RunFolder.origin` names the other run.
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
from jaxqat.pipeline.run.snapshots import check_origin, split_state
from jaxqat.pipeline.stages import StageRun, check_finished

# Settings without influence on the float network, by the first part of their keys; 'compilation'
# changes no more than the order of sums.
IRRELEVANT = ("name", "quant", "qat", "evaluation_batch_size", "checkpoint", "compilation")


@dataclasses.dataclass(frozen=True)
class FloatStage:
    """A finished FP32 stage that another run can start from.

    Attributes:
        folder: The run folder that holds it.
        steps: Steps of the checkpoints to copy: the last one, and the best one if it is selected.
        origin: Name and config hash of the run that trained it.
    """

    folder: RunFolder
    steps: tuple[int, ...]
    origin: dict[str, Any]

    def copy_to(self, folder: RunFolder) -> None:
        """Copy it to a run without FP32 checkpoints; the checkpoints appear atomically."""
        records = [r for r in self.folder.read_metrics() if r["stage"] == "fp32"]
        folder.replace_metrics("fp32", records)
        temporary, final = folder.path / ".fp32.tmp", folder.checkpoints("fp32")
        shutil.rmtree(temporary, ignore_errors=True)  # Left by a killed process.
        try:
            for step in self.steps:
                there = self.folder.checkpoints("fp32") / str(step)
                shutil.copytree(there, temporary / str(step))
            (temporary / folder.origin.name).write_text(json.dumps(self.origin) + "\n")
            final.parent.mkdir(exist_ok=True)
            if final.exists():  # It holds no checkpoint.
                shutil.rmtree(final)
            temporary.rename(final)
        except OSError as error:
            raise RunFolderError(f"{final}: cannot be written: {error}.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_settings(experiment: Experiment, workdir: Path) -> None:
    """Check that an experiment would train the same float network as another run.

    Raises:
        RunFolderError: If it is not a run folder, or a setting differs; lists every such setting.
    """
    theirs = RunFolder(workdir).load_config()
    differing = [
        line
        for line in configs.differences(theirs, experiment)
        if line.partition(":")[0].partition(".")[0] not in IRRELEVANT
    ]
    if differing:
        raise RunFolderError(
            f"{workdir}: its FP32 network has other settings. There -> here:\n  "
            + "\n  ".join(differing)
            + "\nUse the same settings, or train FP32 without --from."
        )


def find_float_stage(networks: Networks, workdir: Path) -> FloatStage:
    """Find the finished FP32 stage of another run and verify the checkpoints to copy.

    Args:
        networks: Networks of the experiment that will start from it.
        workdir: The other run's folder; nothing in it is changed.

    Raises:
        RunFolderError: If it is not a run folder, has other settings or other data, or its FP32
            stage is not finished.
        CheckpointError: If a checkpoint is damaged.
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
        check_origin(each, networks)
    info = restored[-1].info
    origin = {"name": info["config"]["name"], "config_hash": info["config_hash"]}
    return FloatStage(folder, steps, origin)
