"""What commands measure on a finished run, as typed data: evaluations/*.json and analysis.json.

These files are written and read by `results.write` and `results.read`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from jaxqat.analysis import Analysis
from jaxqat.pipeline.results import RunInfo, Scores, VerificationResult
from jaxqat.pipeline.settings.data import SplitName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(RunInfo):
    """The content of evaluations/STAGE_SPLIT.json: a network of the run on a split.

    Attributes:
        stage: The network: a trained one (fp32, qat), or the integer network of post-training
            quantization (ptq) or of quantization-aware training (integer).
        recipe: Name of the recipe of post-training quantization; None for another stage.
        split: The split.
        step: Training step of its checkpoint.
        evaluate_images_per_s: Images per second.
        metrics: Scores on the split.
    """

    WRITTEN_BY: ClassVar[str] = "jaxqat evaluate"

    stage: Literal["fp32", "ptq", "qat", "integer"]
    split: SplitName
    step: int
    evaluate_images_per_s: float
    metrics: Scores
    recipe: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(VerificationResult, RunInfo):
    """The content of evaluations/verify_*.json: an integer network compared with its reference.

    Attributes:
        of: The two networks and the split.
    """

    WRITTEN_BY: ClassVar[str] = "jaxqat verify"

    of: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunAnalysis(Analysis, RunInfo):
    """The content of analysis.json: the layers of a run's quantized network.

    Attributes:
        stage: Stage of the network.
        split: Split that the examples are from.
        step: Training step of its checkpoint.
        recipe: Recipe of the network.
        calibration_batches: Training batches that the activation ranges come from at first.
    """

    WRITTEN_BY: ClassVar[str] = "jaxqat analyze"

    stage: Literal["qat", "ptq"]
    split: SplitName
    step: int
    recipe: dict[str, Any]
    calibration_batches: int
