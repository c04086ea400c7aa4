"""Checkpoints of one stage: Orbax, plus what it leaves open: integrity, identity, clear errors.

A step holds `model` (parameters and collections), `optimizer` (all else of the training state) and
`info`, a JSON file with the resolved config, the data's fingerprint and the SHA-256, shape and
dtype of every array. The three become visible together or not at all. Orbax restores an array with
a flipped bit, or of another dtype, without a word; here the manifest is compared before anything
is used.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxqat.pipeline.checkpoint.config import CheckpointConfig, KeepLastAndBest, best
from jaxqat.pipeline.checkpoint.manifest import (
    CheckpointError,
    DamagedCheckpointError,
    check_fits,
    manifest,
)
from jaxqat.pipeline.hashing import json_sha256

logger = logging.getLogger(__name__)

FORMAT = 1
MODEL, OPTIMIZER, INFO = "model", "optimizer", "info"
BEST_BY = "validation_accuracy"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
        step: Its number.
        parts: The restored trees by name, 'model' and, if asked for, 'optimizer', as NumPy arrays.
        info: What was saved beside them.
    """

    step: int
    parts: dict[str, Any]
    info: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one stage in `directory`.

    A context manager: leaving the block waits for what is still being written.

    Attributes:
        directory: Holds one folder a step.
        read_only: Whether nothing is ever written, not even leftovers cleaned up.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, read_only: bool = False):
        self.directory = directory.absolute()
        self.read_only = read_only
        self._keep_best = config.keep_best
        self._scores: dict[int, float] = {}
        policy = KeepLastAndBest(config.keep_last, self._scores)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else policy,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
            save_interval_steps=0 if read_only else 1,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except Exception as error:  # Orbax raises many types; all mean the same here.
            raise CheckpointError(f"{self.directory}: cannot be opened: {error}") from error
        if config.keep_best:
            self._read_scores()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        # After an error in writing, the manager would only raise the same one again.
        if not isinstance(error, CheckpointError):
            self.wait()
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps that were finished, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest validation accuracy, the newest of equal ones.

        Returns:
            None if no step has such a number: there is no validation split.
        """
        return best(self._scores, self.steps())

    def _read_scores(self) -> None:
        for step in self.steps():
            try:
                self._note_score(step, self._info(step)["record"])
            except DamagedCheckpointError as error:
                logger.warning("%s It is not considered as the best one.", error)

    def _note_score(self, step: int, record: Mapping[str, Any] | None) -> None:
        if record is not None and record.get(BEST_BY) is not None:
            self._scores[step] = record[BEST_BY]

    def save(
        self,
        step: int,
        *,
        model: Any,
        optimizer: Any,
        record: Mapping[str, Any] | None,
        extra: Mapping[str, Any],
    ) -> None:
        """Start to write a step; the arrays are copied before this returns.

        Args:
            step: Its number, larger than all before it.
            model: Tree of arrays that evaluation needs.
            optimizer: Tree of arrays that only training needs.
            record: Metrics of the epoch that ends here, or None within an epoch.
            extra: JSON-able: config, fingerprint, whatever else identifies the run.

        Raises:
            CheckpointError: If this or an earlier step could not be written.
        """
        self.wait()
        parts = jax.device_get({MODEL: model, OPTIMIZER: optimizer})
        info = {
            "format": FORMAT,
            "step": step,
            "record": dict(record) if record else None,
            **extra,
            "arrays": {name: manifest(part) for name, part in parts.items()},
        }
        info["sha256"] = json_sha256(info)
        items: dict[str, Any] = {
            name: ocp.args.StandardSave(part)  # pyright: ignore[reportCallIssue]
            for name, part in parts.items()
        }
        items[INFO] = ocp.args.JsonSave(info)  # pyright: ignore[reportCallIssue]
        if self._keep_best:
            self._note_score(step, record)
        with _writing(self.directory):
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise CheckpointError(f"{self.directory / str(step)} exists already: not written.")

    def wait(self) -> None:
        """Wait until all is on the disk.

        Raises:
            CheckpointError: If it could not be written: disk full, folder read-only or gone.
        """
        with _writing(self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, target: Mapping[str, Any], *, step: int | None = None) -> Restored:
        """Read one step and verify it.

        Args:
            target: The parts to read, with arrays or `jax.ShapeDtypeStruct`s for leaves: what
                the caller's model expects.
            step: Which one; None for the newest.

        Raises:
            DamagedCheckpointError: If it cannot be read or is not what was saved; names the step.
            CheckpointError: If there is none, or it is of another model.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{self.directory}: {which}; finished steps are {steps}.")
        step = steps[-1] if step is None else step
        info = self._info(step)
        where = self.directory / str(step)
        for name, part in target.items():
            check_fits(where, info["arrays"].get(name, {}), name, part)
        # NumPy targets: nothing goes to a device before it is verified.
        parts = self._read(
            step,
            {
                name: jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), part)
                for name, part in target.items()
            },
        )
        for name, part in parts.items():
            for path, found in manifest(part).items():
                if found != info["arrays"][name][path]:
                    raise DamagedCheckpointError(
                        f"{where} is damaged: the content of {name}/{path} is not what was saved "
                        f"(SHA-256 {found['sha256'][:12]}..., saved as "
                        f"{info['arrays'][name][path]['sha256'][:12]}...)."
                    )
        return Restored(step, parts, info)

    def restore_newest_good(self, target: Mapping[str, Any]) -> Restored | None:
        """The newest step that is whole; damaged newer ones are moved aside and named.

        Returns:
            None if no step was ever finished.

        Raises:
            CheckpointError: If there are steps and none of them is whole.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            try:
                restored = self.restore(target, step=step)
            except DamagedCheckpointError as error:
                logger.error("%s Falling back to the step before it.", error)
                damaged.append(step)
                continue
            for bad in damaged:
                self._move_aside(bad)
            return restored
        if damaged:
            raise CheckpointError(
                f"{self.directory}: all checkpoints are damaged (steps {damaged}). Delete the "
                "folder to train this stage again from its start."
            )
        return None

    def _move_aside(self, step: int) -> None:
        """Out of the store, where its number is needed again, but not out of the run."""
        aside = self.directory.parent / "damaged" / f"{self.directory.name}-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (self.directory / str(step)).rename(aside)
        self._manager.reload()

    def _read(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        items = {
            name: ocp.args.StandardRestore(part)  # pyright: ignore[reportCallIssue]
            for name, part in targets.items()
        }
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax, TensorStore and JSON raise many types on damage.
            raise DamagedCheckpointError(
                f"{self.directory / str(step)} is damaged: it cannot be read "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
            ) from error
        return {name: read[name] for name in targets}

    def _info(self, step: int) -> dict[str, Any]:
        """The step's JSON part, verified."""
        where = self.directory / str(step)
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(**{INFO: ocp.args.JsonRestore()}),
            )
            info = dict(read[INFO])
            expected = info.pop("sha256")
        except Exception as error:  # As above.
            raise DamagedCheckpointError(
                f"{where} is damaged: its info cannot be read ({type(error).__name__})."
            ) from error
        if json_sha256(info) != expected:
            raise DamagedCheckpointError(f"{where} is damaged: its info is not what was saved.")
        if info["format"] != FORMAT:
            raise CheckpointError(f"{where}: format {info['format']!r}, expected {FORMAT}.")
        return info


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Disk full, read-only, folder gone: Orbax passes on whatever its threads met."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{directory}: a checkpoint could not be written ({type(error).__name__}: {error}). "
            "Checkpoints finished before are whole; run again to continue from the newest."
        ) from error
