"""Why a run's quantized network is less accurate than its float one: the command `analyze`."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from jaxqat.analysis import analyze as analyze_layers
from jaxqat.integer._store.files import write_json
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.display import print_analysis
from jaxqat.pipeline.evaluation import find_split
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import calibrated
from jaxqat.pipeline.report import write_analysis
from jaxqat.pipeline.results import to_json
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.results import describe_run
from jaxqat.pipeline.run.snapshots import Model, restore_model

STAGES = ("qat", "ptq")
# Images whose real values of all tensors are held at a time: a few MB each.
ANALYZED_AT_A_TIME = 100


def analyze(
    workdir: Path,
    *,
    stage: Literal["qat", "ptq"] = "qat",
    split: str = "test",
    images: int = 1000,
    console: Console | None = None,
) -> dict[str, Any]:
    """Find the layers at which a run's quantized network loses accuracy.

    Writes RUN/analysis.json and RUN/analysis.html, and nothing else.

    Args:
        workdir: The run folder.
        stage: 'qat', the network that was fine-tuned, against the same weights in float; or
            'ptq', post-training quantization: that of FP32 with the ranges that QAT begins with.
        split: 'test', 'train' or 'validation'.
        images: How many of the split, from its first on.
        console: Where the table is shown; None for standard output.

    Returns:
        The content of analysis.json.

    Raises:
        RunFolderError: It is no run folder, was never quantized, or cannot be written.
        DataError: The data is missing, damaged or another than the run's.
        CheckpointError: The checkpoint is damaged.
        QuantizationError: The recipe quantizes no layer, or the network's result is not finite.
        ReportError: The page cannot be written.
    """
    console = console or Console()
    folder = RunFolder(Path(workdir))
    experiment = folder.load_config()
    dataset = load_dataset(experiment.data)
    chosen = find_split(dataset, split)
    chosen = chosen.take(np.arange(min(images, len(chosen))))
    # Batches of as near as can be one size: each size is compiled.
    parts = np.array_split(np.arange(len(chosen)), -(-len(chosen) // ANALYZED_AT_A_TIME))
    with matmul_precision(experiment):
        networks = Networks.build(experiment, dataset)
        model = _model(networks, folder, stage)
        found = analyze_layers(
            networks.quantized,
            model.tree(),
            batches=(chosen.images[part] for part in parts),
            labels=(chosen.labels[part] for part in parts),
            preprocess=networks.normalize,
            train=False,
        )
    result = {
        **to_json(describe_run(experiment, dataset, None)),
        "stage": stage,
        "split": split,
        "step": model.step,
        **dataclasses.asdict(found),
    }
    title = f"{experiment.name}: {stage}, {len(chosen):,} images of the {split} split"
    print_analysis(title, found.rows(), found.summary(), console)
    write_json(folder.analysis, result, error=RunFolderError)
    page = write_analysis(folder.path, result)
    console.print(f"analysis: {page}", highlight=False, soft_wrap=True)
    return result


def _model(networks: Networks, folder: RunFolder, stage: str) -> Model:
    if stage == "qat":
        return restore_model(networks, folder, "qat")
    fp32 = restore_model(networks, folder, "fp32")
    return calibrated(networks, fp32)
