"""Training of a stage: optimizer, training step, and a loop that can stop and resume."""

from jaxqat.pipeline.settings.training import OptimizerConfig, QatConfig, StageConfig
from jaxqat.pipeline.training.compilation import COMPILATIONS, DEFAULT, FAST, Compilation
from jaxqat.pipeline.training.loop import DivergedError, Record, Reporter, StagePlan, run_stage
from jaxqat.pipeline.training.optimizer import make_optimizer, make_schedule
from jaxqat.pipeline.training.step import (
    Collections,
    Data,
    Forward,
    StepReport,
    TrainState,
    cross_entropy,
    init_state,
    make_step,
)
from jaxqat.pipeline.training.stop import Stopped, StopRequest, stop_on_signals

__all__ = [
    "COMPILATIONS",
    "DEFAULT",
    "FAST",
    "Collections",
    "Compilation",
    "Data",
    "DivergedError",
    "Forward",
    "OptimizerConfig",
    "QatConfig",
    "Record",
    "Reporter",
    "StageConfig",
    "StagePlan",
    "StepReport",
    "StopRequest",
    "Stopped",
    "TrainState",
    "cross_entropy",
    "init_state",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "run_stage",
    "stop_on_signals",
]
