"""`jaxqat evaluate`: evaluate a network of a run on a split."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset, load_dataset
from jaxqat.pipeline.display import print_evaluation
from jaxqat.pipeline.evaluation import Evaluator, IntegerEvaluator, find_split, measure
from jaxqat.pipeline.integer_networks import check_network_data, load_network
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import describe_run
from jaxqat.pipeline.run.snapshots import restore_model


def evaluate(
    run: Path,
    *,
    stage: Literal["fp32", "ptq", "qat", "integer"] = "integer",
    split: Literal["test", "train", "validation"] = "test",
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a network of a run on a split, from the run folder alone.

    Writes RUN/evaluations/STAGE_SPLIT.json and nothing else.

    Args:
        run: Run folder.
        stage: Network to evaluate: a trained one from its checkpoint (fp32, qat), or an integer
            network, that of post-training quantization from RUN/ptq (ptq) or that of
            quantization-aware training from RUN/integer (integer).
        split: Images to evaluate on.
        console: Where the metrics are printed; None for standard output.

    Returns:
        The metrics, with the run, stage, split and training step they belong to.

    Raises:
        RunFolderError: The folder is no run folder, holds no such network, or cannot be written.
        DataError: The data is missing, damaged or differs from the run's.
        CheckpointError: The checkpoint is missing or damaged.
        ArtifactError: The integer network is damaged.
    """
    console = console or Console()
    folder = RunFolder(Path(run))
    experiment = folder.load_config()
    if stage in ("fp32", "qat"):
        measured = _evaluate_checkpoint(folder, experiment, split, stage)
    else:
        measured = _evaluate_integer(folder, experiment, split, stage)
    dataset, step, metrics, speed = measured
    result = {
        **describe_run(experiment, dataset, None),
        "stage": stage,
        "split": split,
        "step": step,
        "evaluate_images_per_s": speed,
        "metrics": metrics,
    }
    print_evaluation(result, console)  # First: the folder may be read-only.
    folder.write_evaluation(f"{stage}_{split}", result)
    return result


def _evaluate_checkpoint(
    folder: RunFolder, experiment: Experiment, split: str, stage: str
) -> tuple[Dataset, int, dict[str, Any], float]:
    dataset = load_dataset(experiment.data)
    images = find_split(dataset, split)
    with matmul_precision(experiment):
        networks = Networks.build(experiment, dataset)
        model = restore_model(networks, folder, stage)
        logits = partial(Evaluator(networks, stage).logits, model.params, model.collections)
        return dataset, model.step, *measure(logits, images, dataset.class_names)


def _evaluate_integer(
    folder: RunFolder, experiment: Experiment, split: str, stage: str
) -> tuple[Dataset, int, dict[str, Any], float]:
    graph = load_network(folder, "ptq" if stage == "ptq" else "qat")
    dataset = load_dataset(experiment.data)
    images = find_split(dataset, split)
    check_network_data(folder, graph, dataset)
    step: Any = graph.metadata["step"]
    logits = IntegerEvaluator(graph, experiment.evaluation_batch_size).logits
    return dataset, step, *measure(logits, images, dataset.class_names)
