"""Which checkpoints are kept."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints are kept (config key `checkpoint`)."""

    keep_last: int = 2
    """Newest checkpoints to keep per stage; 2 keeps one as a fallback."""

    keep_best: bool = True
    """Whether to also keep the checkpoint with the best validation accuracy, if there is one."""

    every_epochs: int = 1
    """Epochs between checkpoints; the last epoch always has one."""

    def __post_init__(self):
        for name in ("keep_last", "every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"checkpoint.{name} must be 1 or more, got {getattr(self, name)!r}."
                )
