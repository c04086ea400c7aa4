"""Checkpoints by Orbax, with a manifest that is verified before anything is used."""

from jaxqat.checkpoint.config import CheckpointConfig
from jaxqat.checkpoint.manifest import CheckpointError, DamagedCheckpointError
from jaxqat.checkpoint.store import CheckpointStore, Restored

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "DamagedCheckpointError",
    "Restored",
]
