"""`jaxqat evaluate`: evaluate a network of a run on a split."""

from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset, load_dataset
from jaxqat.pipeline.display import console_for, keep_evaluation, print_evaluation, print_json
from jaxqat.pipeline.evaluation import Measured, Predictor, find_split, measure
from jaxqat.pipeline.integer_networks import (
    check_network_data,
    check_recipe,
    load_network,
    network_folder,
)
from jaxqat.pipeline.measurements import Evaluation, SplitName
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import describe_run
from jaxqat.pipeline.run.snapshots import restore_model
from jaxqat.pipeline.terminal import tell

# The integer networks that can be evaluated, and the stage of each.
INTEGER = {"integer": "qat", "ptq": "ptq"}


def evaluate(
    run: Path,
    *,
    stage: Literal["fp32", "ptq", "qat", "integer"] = "integer",
    recipe: str | None = None,
    split: SplitName = "test",
    json: bool = False,
    console: Console | None = None,
) -> Evaluation:
    """Evaluate a network of a run on a split, from the run folder alone.

    Writes RUN/evaluations/STAGE_SPLIT.json (ptq_RECIPE_SPLIT.json for ptq) and nothing else. If the
    run folder is read-only, a warning says so.

    Args:
        run: Run folder.
        stage: Network to evaluate: a trained one from its checkpoint (fp32, qat), or an integer
            network, that of post-training quantization from RUN/ptq/RECIPE (ptq) or that of
            quantization-aware training from RUN/integer (integer).
        recipe: Recipe of the network of post-training quantization, for a run with several; by
            default that of the run, or the only one.
        split: Images to evaluate on.
        json: Print the content of the file as JSON on standard output, and all else on standard
            error.
        console: Where the metrics are printed; None for standard output.

    Returns:
        Content of RUN/evaluations/STAGE_SPLIT.json.

    Raises:
        RunFolderError: The folder is no run folder, holds no such network, or cannot be written.
        DataError: The data is missing, damaged or differs from the run's.
        CheckpointError: The checkpoint is missing or damaged.
        ArtifactError: The integer network is damaged.
    """
    console = console_for(console, as_json=json)
    folder = RunFolder(Path(run))
    experiment = folder.load_config()
    check_recipe(stage, recipe)
    if stage in INTEGER:
        path = network_folder(folder, INTEGER[stage], recipe)
        recipe = path.name if stage == "ptq" else None
        found = _evaluate_integer(folder, experiment, split, stage, recipe, console)
    else:
        found = _evaluate_checkpoint(folder, experiment, split, stage, console)
    dataset, step, measured = found
    name = stage if recipe is None else f"{stage}_{recipe}"
    result = Evaluation(
        **vars(describe_run(experiment, dataset, None)),
        stage=stage,
        recipe=recipe,
        split=split,
        step=step,
        evaluate_images_per_s=measured.images_per_s,
        metrics=measured.scores,
    )
    images = f"{measured.scores.n:,} images of the {split} split"
    print_evaluation(f"{experiment.name}: {name} at step {step}, {images}", measured, console)
    if json:
        print_json(result)
    keep_evaluation(folder, f"{name}_{split}", result, console)
    return result


def _evaluate_checkpoint(
    folder: RunFolder, experiment: Experiment, split: str, stage: str, console: Console
) -> tuple[Dataset, int, Measured]:
    tell(f"data: loading {experiment.data.name}", console)
    dataset = load_dataset(experiment.data)
    images = find_split(dataset, split)
    tell(f"{stage}: tracing the network and restoring it", console)
    with matmul_precision(experiment):
        networks = Networks.build(experiment, dataset)
        model = restore_model(networks, folder, stage)
        predictor = Predictor.of_stage(networks, stage)
        names, tree = dataset.class_names, model.tree()
        measured = measure(predictor, images, names, tree, what=stage, console=console)
        return dataset, model.step, measured


def _evaluate_integer(
    folder: RunFolder,
    experiment: Experiment,
    split: str,
    name: str,
    recipe: str | None,
    console: Console,
) -> tuple[Dataset, int, Measured]:
    graph = load_network(folder, INTEGER[name], recipe)
    tell(f"data: loading {experiment.data.name}", console)
    dataset = load_dataset(experiment.data)
    images = find_split(dataset, split)
    check_network_data(folder, graph, dataset)
    step: Any = graph.metadata["step"]
    predictor = Predictor.of_graph(graph, experiment.evaluation_batch_size)
    measured = measure(predictor, images, dataset.class_names, what=name, console=console)
    return dataset, step, measured
