"""Which checkpoints are kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which states are kept (config key `checkpoint`)."""

    keep_last: int = 2
    """Newest checkpoints to keep per stage; 2 leaves one to fall back on."""

    keep_best: bool = True
    """Whether to keep the one best on the validation split too, if there is such a split."""

    every_epochs: int = 1
    """Epochs from one checkpoint to the next; the last epoch always gets one."""

    def __post_init__(self):
        for name in ("keep_last", "every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"checkpoint.{name} must be 1 or more, got {getattr(self, name)!r}."
                )


@dataclasses.dataclass(frozen=True)
class KeepLastAndBest:
    """Orbax preservation policy: the newest steps, and the one with the best score.

    Attributes:
        last: How many of the newest to keep.
        scores: Validation accuracy by step; among equals the newest is the best. A step without a
            score is never the best.
    """

    last: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of the steps, in ascending order, stay; Orbax deletes the others."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.last :], best(self.scores, steps)}
        return [step in kept for step in steps]


def best(scores: Mapping[int, float], steps: Sequence[int]) -> int | None:
    """The step with the highest score, the newest of equal ones; None if none has a score."""
    return max(
        (step for step in steps if step in scores), key=lambda s: (scores[s], s), default=None
    )
