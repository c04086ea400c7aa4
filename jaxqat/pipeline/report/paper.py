"""What the paper reports, and whether a run may be held against it.

"8 Bit Quantized Neural Network" trains ResNet-18 on CIFAR-10 for 100 epochs in FP32 and
fine-tunes it for 30 in int8.
"""

from typing import Any

from jaxqat.pipeline.report.read import Run

# Of the paper's Table 1 we know its accuracies only (fractions of 1).
ACCURACY = {"fp32": 0.9479, "qat": 0.9460}
DATASET = "cifar10"
MODEL = {"depth": 18, "width": 64, "stem": "cifar"}
EPOCHS = {"fp32": 100, "qat": 30}


def dataset_name(run: Run) -> str:
    """Name of the run's data set, without the version: 'cifar10' for 'cifar10:3.0.2'."""
    name = (run.results.get("data") or {}).get("name") or _setting(run, "data", "name") or "unknown"
    return str(name).split(":")[0]


def is_on_paper_data(run: Run) -> bool:
    """Whether the paper's figures have a place beside those of this run at all."""
    return dataset_name(run) == DATASET


def departures(run: Run) -> list[str]:
    """Why this run's figures are not comparable with the paper's; empty where they are.

    Only what decides how good a network can get counts: data, size and length of training.
    Another learning rate is another recipe for the same task.
    """
    if not is_on_paper_data(run):
        return [f"the data set is {dataset_name(run)}, the paper's is CIFAR-10"]
    reasons = [
        f"{key} is {found}, the paper's is {wanted}"
        for key, wanted in MODEL.items()
        if (found := _setting(run, "model", key)) not in (None, wanted)
    ]
    for stage, wanted in EPOCHS.items():
        found = stage_epochs(run, stage)
        if found not in (None, wanted):
            reasons.append(f"{stage.upper()} ran {found} epochs, the paper's {wanted}")
    for key in ("train_limit", "test_limit"):
        if limit := _setting(run, "data", key):
            reasons.append(f"data.{key} keeps {limit} images only")
    if held_out := _setting(run, "data", "validation_size"):
        reasons.append(f"{held_out} training images were held out for validation")
    return reasons


def stage_epochs(run: Run, stage: str) -> int | None:
    """Epochs a stage took, or None where the run has no such stage."""
    if stage not in run.results:
        return None
    recorded = run.results[stage].get("epochs")
    return (
        recorded
        if recorded is not None
        else max((record["epoch"] for record in run.epochs.get(stage, [])), default=None)
    )


def _setting(run: Run, section: str, key: str) -> Any:
    settings = run.config.get(section)
    return settings.get(key) if isinstance(settings, dict) else None
