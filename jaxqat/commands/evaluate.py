"""`jaxqat evaluate`: test a network of a run on a split."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset, load_dataset
from jaxqat.pipeline.display import print_evaluation
from jaxqat.pipeline.evaluation import Evaluator, IntegerEvaluator, find_split, measure
from jaxqat.pipeline.integer_networks import NETWORKS, check_network_data, load_network
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import describe_run
from jaxqat.pipeline.run.snapshots import restore_model


def evaluate(
    workdir: Path, *, stage: str = "int8", split: str = "test", console: Console | None = None
) -> dict[str, Any]:
    """Test a network on a split, from the run folder alone.

    Writes RUN/evaluations/STAGE_SPLIT.json and nothing else.

    Args:
        workdir: The run folder.
        stage: 'fp32' or 'qat', from their checkpoints, or 'int8' or 'ptq', from RUN/int8 or RUN/ptq
            alone.
        split: 'test', 'train' or 'validation'.
        console: Where the metrics are shown; None for standard output.

    Returns:
        The metrics, and which network they are of.

    Raises:
        RunFolderError: It is no run folder, has no such network, or cannot be written.
        DataError: The data is missing, damaged or another than the run's.
        CheckpointError: There is no checkpoint, or it is damaged.
        ArtifactError: The integer network is damaged.
    """
    console = console or Console()
    folder = RunFolder(Path(workdir))
    experiment = folder.load_config()
    measured = _evaluate_integer if stage in NETWORKS else _evaluate_stage
    dataset, step, metrics, speed = measured(folder, experiment, split, stage)
    result = {
        **describe_run(experiment, dataset, None),
        "stage": stage,
        "split": split,
        "step": step,
        "evaluate_images_per_s": speed,
        "metrics": metrics,
    }
    print_evaluation(result, console)  # First: the folder may be one that cannot be written.
    folder.write_evaluation(f"{stage}_{split}", result)
    return result


def _evaluate_stage(
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
    folder: RunFolder, experiment: Experiment, split: str, name: str
) -> tuple[Dataset, int, dict[str, Any], float]:
    graph = load_network(folder, name)
    dataset = load_dataset(experiment.data)
    images = find_split(dataset, split)
    check_network_data(folder, graph, dataset)
    step: Any = graph.metadata["step"]
    logits = IntegerEvaluator(graph, experiment.evaluation_batch_size).logits
    return dataset, step, *measure(logits, images, dataset.class_names)
