"""The settings of a training stage, its optimizer and its compilation."""

import dataclasses
from typing import Literal

SCHEDULES = ("cosine", "constant")
COMPILATIONS = ("default", "fast")
"""Names of the ways to compile a training step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer (config keys `fp32.optimizer`, `qat.optimizer`)."""

    learning_rate: float = 0.1
    """Peak learning rate, reached after the warm-up."""

    momentum: float = 0.9
    """Decay of the accumulated gradient per training step: at least 0, below 1."""

    nesterov: bool = False
    """Whether to use Nesterov momentum (Sutskever et al. 2013)."""

    weight_decay: float = 1e-4
    """Coefficient of the L2 penalty's gradient, added to the gradient before the momentum."""

    decay_norm_and_bias: bool = True
    """Whether weight decay also applies to batch norm's parameters and to biases."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine to 0 (arXiv:1608.03983), or constant."""

    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises linearly from 0."""

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}.")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, got 0.")
        for name in ("weight_decay", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Training of the float network (config key `fp32`)."""

    epochs: int = 100
    """Passes over the training split."""

    batch_size: int = 128
    """Images per training step; an incomplete last batch of an epoch is dropped."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes: at least 0, below 1."""

    steps_per_dispatch: int | None = None
    """Training steps per device call; null for 1 on a CPU and up to 50 elsewhere."""

    skip_failed_steps: bool = False
    """Whether to skip a step whose loss, gradient or new weights are infinite or NaN, with a
    warning; otherwise the run stops."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimizer."""

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)!r}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}.")
        if self.steps_per_dispatch is not None and self.steps_per_dispatch < 1:
            raise ValueError(
                f"steps_per_dispatch must be 1 or more, or null, got {self.steps_per_dispatch!r}."
            )
        if self.optimizer.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs must be below epochs ({self.epochs}), "
                f"got {self.optimizer.warmup_epochs!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatConfig(StageConfig):
    """Fine-tuning of the quantized network (config key `qat`)."""

    epochs: int = 30
    """Passes over the training split, including the frozen ones."""

    calibration_batches: int = 8
    """Training batches, without augmentation, for calibrating the activation ranges."""

    reestimate_batch_norm: bool = False
    """Whether to estimate batch norm's statistics anew before calibration, from as many augmented
    training batches."""

    freeze_epochs: int | None = None
    """Number of last epochs with frozen ranges and batch-norm statistics; null for a fifth of all
    epochs, at least one if there are two or more."""

    memory: Literal["values", "codes"] = "values"
    """What a training step keeps of quantized tensors for its backward pass, while ranges move:
    'values', or 'codes', a quarter of it, for some more time."""

    test_calibrated: bool = True
    """Whether to also convert and test the network of post-training quantization: calibrated, but
    not fine-tuned."""

    sentinel: bool = True
    """Whether to compare integer sums of a few layers with NumPy's after each epoch, and to stop on
    a difference: a compiler that computes them wrongly is found out."""

    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3)
    )
    """The optimizer."""

    def __post_init__(self):
        super().__post_init__()
        if self.calibration_batches < 1:
            raise ValueError(
                f"calibration_batches must be 1 or more, got {self.calibration_batches!r}."
            )
        if self.freeze_epochs is not None and not 0 <= self.freeze_epochs <= self.epochs:
            raise ValueError(
                f"freeze_epochs must be in 0..{self.epochs} (qat.epochs) or null, "
                f"got {self.freeze_epochs!r}."
            )

    @property
    def frozen_from(self) -> int:
        """The first epoch, counted from 1, with frozen ranges and statistics."""
        frozen = self.freeze_epochs
        if frozen is None:
            frozen = max(self.epochs // 5, 1) if self.epochs >= 2 else 0
        return self.epochs - frozen + 1
