"""Checkpoints by Orbax, each verified against a manifest before use."""

from jaxqat.pipeline.checkpoint.manifest import CheckpointError, DamagedCheckpointError
from jaxqat.pipeline.checkpoint.store import CheckpointStore, Restored
from jaxqat.pipeline.settings.checkpoint import CheckpointConfig

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "DamagedCheckpointError",
    "Restored",
]
