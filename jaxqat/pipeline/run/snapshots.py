"""Save and restore a run's networks: training states as checkpoints."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from jaxqat.pipeline import config as configs
from jaxqat.pipeline.checkpoint import CheckpointStore, Restored
from jaxqat.pipeline.checkpoint.manifest import DamagedCheckpointError
from jaxqat.pipeline.checkpoint.store import MODEL, OPTIMIZER
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.training import Collections, TrainState


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters and collections of a network.

    Attributes:
        params: Parameters.
        collections: Batch statistics and activation ranges.
        step: Number of updates in its stage; 0 before training.
    """

    params: Any
    collections: Collections
    step: int = 0

    @classmethod
    def of(cls, restored: Restored) -> "Model":
        """Return the network in a checkpoint."""
        tree = dict(restored.parts[MODEL])
        return cls(tree.pop("params"), tree, restored.step)

    def tree(self) -> dict[str, Any]:
        """Return 'params' and the collections in one dictionary."""
        return {"params": self.params, **self.collections}


def split_state(state: TrainState) -> dict[str, Any]:
    """Return the two parts of a checkpoint: the model and the optimizer's state."""
    rest = state._asdict()
    model = {"params": rest.pop("params"), **rest.pop("collections")}
    return {MODEL: model, OPTIMIZER: rest}


def join_state(restored: Restored) -> TrainState:
    """Return the training state in a checkpoint."""
    model = Model.of(restored)
    return TrainState(
        params=model.params, collections=model.collections, **restored.parts[OPTIMIZER]
    )


def open_store(
    experiment: configs.Experiment, folder: RunFolder, stage: str, *, read_only: bool = False
) -> CheckpointStore:
    """Open the checkpoints of a stage; only a validation split determines a best one."""
    config = experiment.checkpoint
    if not experiment.data.validation_size:
        config = dataclasses.replace(config, keep_best=False)
    return CheckpointStore(folder.checkpoints(stage), config, read_only=read_only)


def restore_selected(store: CheckpointStore, networks: Networks, stage: str) -> Restored:
    """Restore and verify the checkpoint that the experiment selects.

    Raises:
        CheckpointError: If it is missing, damaged, or of another model.
        RunFolderError: If it was trained on other data.
    """
    params, collections = networks.shapes(stage)
    step = store.best_step() if networks.experiment.select == "best" else None
    restored = store.restore({MODEL: {"params": params, **collections}}, step=step)
    check_origin(restored, networks)
    return restored


def restore_model(networks: Networks, folder: RunFolder, stage: str) -> Model:
    """Restore the network of a stage that the experiment selects, from its run folder.

    Raises:
        CheckpointError: If the checkpoint is damaged or of another model.
        RunFolderError: If the stage has no checkpoint, or was trained on other data.
    """
    folder.check_checkpoints(stage)
    with open_store(networks.experiment, folder, stage, read_only=True) as store:
        try:
            return Model.of(restore_selected(store, networks, stage))
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{error} {repair_hint(folder)}") from error


def repair_hint(folder: RunFolder) -> str:
    """Return how to train again from the last good checkpoint."""
    return (
        "To train again from the last good checkpoint: `jaxqat train --repair --config "
        f"{folder.config} --workdir {folder.path}`."
    )


def check_step(folder: RunFolder, stage: str, model: Model, converted: int) -> None:
    """Check that a network is the one that an integer network was converted from.

    Args:
        folder: The run folder.
        stage: Stage of the network's checkpoint.
        model: The network.
        converted: Step of the checkpoint that was converted.

    Raises:
        DamagedCheckpointError: If not; names the step that is damaged.
    """
    if model.step != converted:
        raise DamagedCheckpointError(
            f"{folder.checkpoints(stage) / str(converted)} is damaged: it is missing or "
            f"incomplete. The integer network was converted from it, and the newest that can be "
            f"restored, of step {model.step}, is another network. {repair_hint(folder)}"
        )


class SourceWarning(UserWarning):
    """The file that defines a network of the user's own has changed since it was trained."""


def check_origin(restored: Restored, networks: Networks) -> None:
    """Check that a checkpoint was trained on this data, and by this network.

    Raises:
        RunFolderError: If it was trained on other data; names what differs.

    Warns:
        SourceWarning: The file of `model.target` has changed since.
    """
    name = f"the checkpoint of step {restored.step}"
    check_same_data(name, restored.info["data"], networks.dataset.fingerprint)
    saved = restored.info.get("source")
    if saved is not None and saved != networks.source:
        warnings.warn(
            f"{name} was trained before the file of model.target "
            f"{networks.experiment.model.target!r} was changed: if the network computes something "
            "else now, its results are not those of the run.",
            SourceWarning,
            stacklevel=2,
        )


def check_same_data(name: str, saved: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Check that a network was trained on this data.

    Args:
        name: Name of the network, for the error message.
        saved: Fingerprint of the data that it was trained on.
        fingerprint: Fingerprint of this data.

    Raises:
        RunFolderError: If not; names what differs.
    """
    there, here = _flat(saved), _flat(fingerprint)
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if differing:
        raise RunFolderError(
            f"{name} was trained on other data. There -> here: "
            + "; ".join(f"{k}: {_short(there.get(k))} -> {_short(here.get(k))}" for k in differing)
        )


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the facts with the paths of their keys, such as "sha256.test"."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        inside = isinstance(value, Mapping)
        flat |= _flat(value, f"{above}{key}.") if inside else {f"{above}{key}": value}
    return flat


def _short(value: Any) -> str:
    """Return a value as text; of a checksum, the first digits."""
    text = repr(value)
    return f"{text[:12]}...'" if len(text) == 66 and " " not in text else text
