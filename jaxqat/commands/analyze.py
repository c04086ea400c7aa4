"""`jaxqat analyze`: find out why a run's quantized network is less accurate than its float one."""

from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from jaxqat.analysis import analyze as analyze_layers
from jaxqat.errors import InputError
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.advice import is_worse, print_advice
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.display import console_for, print_analysis, print_json
from jaxqat.pipeline.evaluation import find_split
from jaxqat.pipeline.measurements import RunAnalysis, SplitName
from jaxqat.pipeline.networks import matmul_precision
from jaxqat.pipeline.post_training import restore_quantized
from jaxqat.pipeline.progress import Work
from jaxqat.pipeline.report import write_analysis, write_report
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import describe_run
from jaxqat.pipeline.terminal import say, tell

# Images per batch. The real values of all tensors of a batch, a few MB per image, stay in memory.
ANALYSIS_BATCH_SIZE = 100


def analyze(
    run: Path,
    *,
    stage: Literal["qat", "ptq"] = "qat",
    recipe: str | None = None,
    split: SplitName = "test",
    images: int = 1000,
    json: bool = False,
    console: Console | None = None,
) -> RunAnalysis:
    """Find the layers where the quantized network loses accuracy.

    Writes RUN/analysis.json and RUN/analysis.html, to which the report links. Each batch runs twice
    per layer: with this layer quantized alone, and with all layers quantized but this one.

    Args:
        run: Run folder.
        stage: Network to analyze, against the same weights in float: that of quantization-aware
            training (qat), or that of post-training quantization, with the recipe and calibration
            of RUN/ptq/RECIPE (ptq).
        recipe: Recipe of the network of post-training quantization, for a run with several; by
            default that of the run, or the only one.
        split: Images to analyze on.
        images: Number of images, 1 or more, counted from the first of the split.
        json: Print the content of the file as JSON on standard output, and all else on standard
            error.
        console: Where the table is printed; None for standard output.

    Returns:
        Content of RUN/analysis.json.

    Raises:
        InputError: `images` is below 1.
        RunFolderError: The folder is no run folder, was never quantized, or cannot be written.
        DataError: The data is missing, damaged or differs from the run's.
        CheckpointError: The checkpoint is damaged.
        QuantizationError: The recipe quantizes no layer, or the network's result is not finite.
        ReportError: A page cannot be written.
    """
    if images < 1:
        raise InputError(f"--images must be 1 or more, got {images!r}.")
    console = console_for(console, as_json=json)
    folder = RunFolder(Path(run))
    experiment = folder.load_config()
    tell(f"data: loading {experiment.data.name}", console)
    dataset = load_dataset(experiment.data)
    chosen = find_split(dataset, split)
    chosen = chosen.take(np.arange(min(images, len(chosen))))
    # Batches of nearly one size, because every size is compiled.
    batches = np.array_split(np.arange(len(chosen)), -(-len(chosen) // ANALYSIS_BATCH_SIZE))
    with matmul_precision(experiment):
        networks, model = restore_quantized(folder, experiment, dataset, stage, recipe, console)
        what = f"analyzing {len(chosen):,} images, layer by layer"
        with Work(console, what, len(chosen)) as work:
            analysis = analyze_layers(
                networks.quantized,
                model.tree(),
                batches=work.track(chosen.images[indices] for indices in batches),
                labels=(chosen.labels[indices] for indices in batches),
                preprocess=networks.normalize,
                train=False,
            )
    result = RunAnalysis(
        **vars(describe_run(experiment, dataset, None)),
        **vars(analysis),
        stage=stage,
        split=split,
        step=model.step,
        recipe=configs.to_dict(networks.experiment)["quant"],
        calibration_batches=networks.experiment.qat.calibration_batches,
    )
    title = f"{experiment.name}: {stage}, {len(chosen):,} images of the {split} split"
    print_analysis(title, result, console)
    real, quantized = analysis.real.accuracy, analysis.quantized.accuracy
    if real is not None and quantized is not None and is_worse(real, quantized):
        used = networks.experiment.quant
        print_advice(analysis, used, console, f"jaxqat quantize {folder.path}")
    if json:
        print_json(result)
    folder.write_analysis(result)
    page = write_analysis(folder.path, result)
    if folder.report.is_file():
        write_report(folder.path)  # It links to the page.
    say(f"analysis: {page}", console)
    return result
