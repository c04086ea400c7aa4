"""The paper's results, and whether a run can be compared with them.

"8 Bit Quantized Neural Network" trains ResNet-18 on CIFAR-10 for 100 epochs in FP32 and
fine-tunes it for 30 epochs in 8 bits.
"""

from typing import Any, NamedTuple

from jaxqat.pipeline.report.read import Run


class PaperScores(NamedTuple):
    """A row of the paper's Table 1, as fractions of 1."""

    accuracy: float
    precision: float
    recall: float
    f1: float


# The paper's text gives the accuracy of 8 bits as in the table; its abstract says 94.77 %.
SCORES = {
    "fp32": PaperScores(accuracy=0.9479, precision=0.9479, recall=0.9478, f1=0.9479),
    "qat": PaperScores(accuracy=0.9460, precision=0.9459, recall=0.9459, f1=0.9460),
}
BITS = "W8A8"
NAMES = {"fp32": "FP32", "qat": f"QAT {BITS}"}
DATASET = "cifar10"
MODEL = {"depth": 18, "width": 64, "stem": "cifar"}
EPOCHS = {"fp32": 100, "qat": 30}


def dataset_name(run: Run) -> str:
    """Return the name of the run's data set without its version."""
    return str(run.results.data["name"]).split(":")[0]


def is_on_paper_data(run: Run) -> bool:
    """Return whether the run uses the paper's data set."""
    return dataset_name(run) == DATASET


def departures(run: Run) -> list[str]:
    """Return the reasons why a run cannot be compared with the paper; empty if it can.

    Data, model, length of training and bits must agree; the optimizer's settings may differ.
    """
    if not is_on_paper_data(run):
        return [f"the data set is {dataset_name(run)}, the paper's is CIFAR-10"]
    reasons = [
        f"{key} is {found}, the paper's is {wanted}"
        for key, wanted in MODEL.items()
        if (found := _setting(run, "model", key)) not in (None, wanted)
    ]
    for stage, wanted in EPOCHS.items():
        result = getattr(run.results, stage)
        if result is not None and result.epochs != wanted:
            reasons.append(f"{stage.upper()} ran {result.epochs} epochs, the paper's {wanted}")
    if run.results.qat is not None and run.results.qat.bits != BITS:
        reasons.append(f"QAT is {run.results.qat.bits}, the paper's is {BITS}")
    for key in ("train_limit", "test_limit"):
        if limit := _setting(run, "data", key):
            reasons.append(f"data.{key} keeps {limit} images only")
    if held_out := _setting(run, "data", "validation_size"):
        reasons.append(f"{held_out} training images were held out for validation")
    return reasons


def _setting(run: Run, section: str, key: str) -> Any:
    settings = run.config.get(section)
    return settings.get(key) if isinstance(settings, dict) else None
