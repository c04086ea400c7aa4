"""Between a training state and a checkpoint: what is saved of a stage, and what of it is used."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxqat.pipeline import config as configs
from jaxqat.pipeline.checkpoint import CheckpointStore, Restored
from jaxqat.pipeline.checkpoint.store import MODEL, OPTIMIZER
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.training import Collections, TrainState


@dataclasses.dataclass(frozen=True)
class Model:
    """The numbers of a network: what evaluation needs.

    Attributes:
        params: Parameters.
        collections: All else: batch statistics, activation ranges.
        step: Updates that its stage has made; 0 where it has yet to begin.
    """

    params: Any
    collections: Collections
    step: int = 0

    @classmethod
    def of(cls, restored: Restored) -> "Model":
        """The network in a checkpoint."""
        tree = dict(restored.parts[MODEL])
        return cls(tree.pop("params"), tree, restored.step)

    def tree(self) -> dict[str, Any]:
        """As a checkpoint holds it: 'params' and the collections."""
        return {"params": self.params, **self.collections}


def split_state(state: TrainState) -> dict[str, Any]:
    """The two parts of a checkpoint: what evaluation needs, and the rest."""
    rest = state._asdict()
    model = {"params": rest.pop("params"), **rest.pop("collections")}
    return {MODEL: model, OPTIMIZER: rest}


def join_state(restored: Restored) -> TrainState:
    """The training state in a checkpoint."""
    model = Model.of(restored)
    return TrainState(
        params=model.params, collections=model.collections, **restored.parts[OPTIMIZER]
    )


def open_store(
    experiment: configs.Experiment, folder: RunFolder, stage: str, *, read_only: bool = False
) -> CheckpointStore:
    """The checkpoints of a stage; without a validation split none of them is the best."""
    config = experiment.checkpoint
    if not experiment.data.validation_size:
        config = dataclasses.replace(config, keep_best=False)
    return CheckpointStore(folder.checkpoints(stage), config, read_only=read_only)


def restore_selected(store: CheckpointStore, networks: Networks, stage: str) -> Restored:
    """The network that the experiment selects, verified.

    Raises:
        CheckpointError: If there is none, it is damaged, or of another model.
        RunFolderError: If it was trained on other data.
    """
    params, collections = networks.shapes(stage)
    step = store.best_step() if networks.experiment.select == "best" else None
    restored = store.restore({MODEL: {"params": params, **collections}}, step=step)
    check_data(restored, networks.dataset.fingerprint)
    return restored


def restore_model(networks: Networks, folder: RunFolder, stage: str) -> Model:
    """The network that the experiment selects of a stage, from its run folder.

    Raises:
        CheckpointError: It is damaged, or of another model.
        RunFolderError: There are no checkpoints of the stage, or they are of other data.
    """
    if not folder.checkpoints(stage).is_dir():
        raise RunFolderError(f"{folder.checkpoints(stage)}: there are no checkpoints of {stage}.")
    with open_store(networks.experiment, folder, stage, read_only=True) as store:
        return Model.of(restore_selected(store, networks, stage))


def check_data(restored: Restored, fingerprint: dict[str, Any]) -> None:
    """Refuse data other than that a checkpoint was trained on.

    Raises:
        RunFolderError: Names what differs.
    """
    check_same_data(f"the checkpoint of step {restored.step}", restored.info["data"], fingerprint)


def check_same_data(what: str, saved: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Refuse data other than that something was trained on.

    Args:
        what: What it is, for the error.
        saved: The fingerprint of what it was trained on.
        fingerprint: Of the data that there is.

    Raises:
        RunFolderError: Names what differs.
    """
    differing = sorted(
        key for key in saved.keys() | fingerprint.keys() if saved.get(key) != fingerprint.get(key)
    )
    if differing:
        raise RunFolderError(
            f"the data is not what {what} was trained on: "
            + "; ".join(f"{k}: {saved.get(k)!r} -> {fingerprint.get(k)!r}" for k in differing)
        )
