"""The policy by which checkpoints are kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class KeepLastAndBest:
    """Orbax preservation policy that keeps the newest checkpoints and the one with the best score.

    Attributes:
        last: Number of newest checkpoints to keep.
        scores: Validation accuracy by step; of equal ones, the newest is the best. A step without a
            score is never the best.
    """

    last: int
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return whether to keep each checkpoint; they are in ascending order."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.last :], best(self.scores, steps)}
        return [step in kept for step in steps]


def best(scores: Mapping[int, float], steps: Sequence[int]) -> int | None:
    """Return the step with the highest score, of equal ones the newest; None without scores."""
    return max(
        (step for step in steps if step in scores), key=lambda s: (scores[s], s), default=None
    )
