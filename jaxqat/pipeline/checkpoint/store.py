"""The checkpoints of a stage: Orbax, with checks of content and identity.

A checkpoint holds `model` (parameters and collections), `optimizer` (the rest of the training
state) and `info`, a JSON file with the resolved config, the data's fingerprint, and the SHA-256,
shape and dtype of every array. All three are written together, atomically. Orbax silently restores
an array with a flipped bit or another dtype; here every array is compared with the manifest before
use.
"""

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxqat.pipeline.checkpoint.late_reports import late_reports_dropped
from jaxqat.pipeline.checkpoint.manifest import (
    CheckpointError,
    DamagedCheckpointError,
    check_fits,
    dictionary,
    manifest,
)
from jaxqat.pipeline.checkpoint.policy import KeepLastAndBest, best
from jaxqat.pipeline.hashing import json_sha256
from jaxqat.pipeline.settings.checkpoint import CheckpointConfig

logger = logging.getLogger(__name__)

FORMAT = 1
MODEL, OPTIMIZER, INFO = "model", "optimizer", "info"
BEST_BY = "validation_accuracy"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint.

    Attributes:
        step: Training step at which it was saved.
        parts: The restored trees, of NumPy arrays: 'model' and, if requested, 'optimizer'.
        info: The content of `info`.
    """

    step: int
    parts: dict[str, Any]
    info: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one stage in `directory`.

    A context manager: leaving the block waits for unfinished writes.

    Attributes:
        directory: Holds one folder per checkpoint, named by its step.
        read_only: Whether nothing is written or cleaned up.
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
        except Exception as error:  # Orbax raises many types.
            raise CheckpointError(f"{self.directory}: cannot be opened: {error}") from error
        if config.keep_best:
            self._read_scores()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        # After a failed write, the manager would raise the same error again.
        if not isinstance(error, CheckpointError):
            self.wait()
            self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Return the step with the highest validation accuracy, of equal ones the newest.

        Returns:
            The step; None if there is no validation accuracy.
        """
        return best(self._scores, self.steps())

    def _read_scores(self) -> None:
        for step in self.steps():
            try:
                self._add_score(step, self._info(step)["record"])
            except DamagedCheckpointError as error:
                logger.warning("%s It cannot be the best one.", error)

    def _add_score(self, step: int, record: Mapping[str, Any] | None) -> None:
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
        """Start to write a checkpoint; the arrays are copied before this returns.

        Args:
            step: Number of the training step, larger than all before it.
            model: Tree of arrays that evaluation needs.
            optimizer: Tree of arrays that only training needs.
            record: Metrics of the epoch that ends here, or None within an epoch.
            extra: What identifies the run, such as config and fingerprint, as JSON values.

        Raises:
            CheckpointError: If this or an earlier checkpoint could not be written, or the disk has
                no room for this one.
        """
        self.wait()
        self.check_space((model, optimizer))
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
            self._add_score(step, record)
        with _writing(self.directory):
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        if not saved:
            raise CheckpointError(f"{self.directory / str(step)} exists already: not written.")

    def check_space(self, state: Any) -> None:
        """Check that the disk has room for a checkpoint.

        Args:
            state: Tree of its arrays, or of their shapes and types.

        Raises:
            CheckpointError: If not; says how much is missing.
        """
        leaves = jax.tree.leaves(state)
        needed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
        with _writing(self.directory):
            total, _, free = shutil.disk_usage(self.directory)
        if free < needed and total:  # Some network file systems do not tell.
            raise CheckpointError(
                f"{self.directory}: a checkpoint takes {needed:,} bytes, and the disk has "
                f"{free:,} bytes left. Free the difference, then run again to continue from the "
                "newest checkpoint."
            )

    def wait(self) -> None:
        """Wait until all checkpoints are on the disk.

        Raises:
            CheckpointError: If one could not be written: disk full, folder read-only or missing.
        """
        with _writing(self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, target: Mapping[str, Any], *, step: int | None = None) -> Restored:
        """Read one checkpoint and verify it.

        Args:
            target: The parts to read, with the caller's arrays or `jax.ShapeDtypeStruct`s as
                leaves.
            step: Its step; None for the newest.

        Raises:
            DamagedCheckpointError: If it cannot be read or differs from what was saved; names the
                step.
            CheckpointError: If it does not exist or is of another model.
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
        # NumPy targets keep everything off the device until it is verified.
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

    def check(self, step: int) -> None:
        """Read the model in a checkpoint and verify it, without knowing which model it is.

        Raises:
            DamagedCheckpointError: If it cannot be read or differs from what was saved.
        """
        self.restore({MODEL: dictionary(self._info(step)["arrays"][MODEL])}, step=step)

    def restore_newest_good(self, target: Mapping[str, Any]) -> Restored | None:
        """Restore the newest undamaged checkpoint; move damaged newer ones aside and log them.

        Returns:
            The checkpoint; None if there are none.

        Raises:
            CheckpointError: If all checkpoints are damaged.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            try:
                restored = self.restore(target, step=step)
            except DamagedCheckpointError as error:
                logger.error("%s Falling back to the checkpoint before it.", error)
                damaged.append(step)
                continue
            for bad in damaged:
                self.move_aside(bad)
            return restored
        if damaged:
            raise CheckpointError(
                f"{self.directory}: all checkpoints are damaged (steps {damaged}). Delete the "
                "folder to train this stage again from its start."
            )
        return None

    def move_aside(self, step: int) -> None:
        """Move a checkpoint to another folder of the run, as its step will be saved again.

        What was moved there before stays: the new one gets a number behind its name.
        """
        aside = self.directory.parent / "damaged" / f"{self.directory.name}-{step}"
        aside.parent.mkdir(exist_ok=True)
        number = 2
        while aside.exists():
            aside = aside.with_name(f"{self.directory.name}-{step}-{number}")
            number += 1
        (self.directory / str(step)).rename(aside)
        self._manager.reload()

    def _read(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        items = {
            name: ocp.args.StandardRestore(part)  # pyright: ignore[reportCallIssue]
            for name, part in targets.items()
        }
        try:
            with late_reports_dropped():
                read = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax, TensorStore and JSON raise many types on damage.
            raise DamagedCheckpointError(
                f"{self.directory / str(step)} is damaged: it cannot be read "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
            ) from error
        return {name: read[name] for name in targets}

    def _info(self, step: int) -> dict[str, Any]:
        """Read and verify the JSON part of a checkpoint."""
        where = self.directory / str(step)
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(**{INFO: ocp.args.JsonRestore()}),
            )
            info = dict(read[INFO])
            expected = info.pop("sha256")
        except Exception as error:  # As in `_read`.
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
    """Raise CheckpointError for any error in writing; Orbax raises many types."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{directory}: a checkpoint could not be written ({type(error).__name__}: {error}). "
            "Earlier checkpoints are good; run again to continue from the newest."
        ) from error
