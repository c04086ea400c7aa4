"""Training stages: the update rule, the step, and the loop with its stops and resumes."""

from jaxqat.training.config import QatConfig, StageConfig
from jaxqat.training.loop import DivergedError, Record, Reporter, Stage, run_stage
from jaxqat.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxqat.training.step import (
    PARAMETERS,
    Collections,
    Data,
    Forward,
    Trained,
    TrainState,
    cross_entropy,
    init_state,
    make_step,
)
from jaxqat.training.stop import Stopped, StopRequest, stop_on_signals

__all__ = [
    "PARAMETERS",
    "Collections",
    "Data",
    "DivergedError",
    "Forward",
    "OptimizerConfig",
    "QatConfig",
    "Record",
    "Reporter",
    "Stage",
    "StageConfig",
    "StopRequest",
    "Stopped",
    "TrainState",
    "Trained",
    "cross_entropy",
    "init_state",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "run_stage",
    "stop_on_signals",
]
