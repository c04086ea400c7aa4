"""Checkpoints by Orbax, each verified against a manifest before use."""

from jaxqat.pipeline.checkpoint.config import CheckpointConfig
from jaxqat.pipeline.checkpoint.manifest import CheckpointError, DamagedCheckpointError
from jaxqat.pipeline.checkpoint.store import CheckpointStore, Restored

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "DamagedCheckpointError",
    "Restored",
]
