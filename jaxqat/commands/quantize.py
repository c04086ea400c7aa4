"""`jaxqat quantize`: quantize the FP32 network of a run without training."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxqat.integer._store.folder import save
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import DataError, Dataset, load_dataset
from jaxqat.pipeline.display import print_results
from jaxqat.pipeline.evaluation import Evaluator, measure
from jaxqat.pipeline.integer_networks import check_network
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import _changed, calibrated, examine
from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError, claim, write_json
from jaxqat.pipeline.run.results import (
    describe_network,
    describe_run,
    describe_tests,
    write_test_samples,
)
from jaxqat.pipeline.run.snapshots import Model, restore_model
from jaxqat.pipeline.stages import StageRun
from jaxqat.pipeline.training import stop_on_signals
from jaxqat.quant import Recipe


def quantize(
    workdir: Path,
    *,
    batches: int | None = None,
    recipe: str | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Quantize the trained float network of a run without training, test it, and report.

    Writes RUN/ptq, the entry 'ptq' of RUN/results.json, and the report, each in one step and only
    once all is measured. Of a run whose QAT is not done, the results hold FP32 and PTQ, and `train`
    goes on with it as before.

    Args:
        workdir: The run folder.
        batches: How many training batches to calibrate on; None for the config's
            `qat.calibration_batches`.
        recipe: Name of a preset to quantize by; None for the config's `quant`.
        command: What was typed, for the record of a run that has no results yet.
        console: Where the results are shown; None for standard output.

    Returns:
        The content of results.json.

    Raises:
        RunFolderError: It is no run folder, its FP32 stage is not finished, it is taken, or cannot
            be written.
        DataError: The data is missing, another than the run's, or has not so many batches.
        RecipeError: There is no such recipe, or it does not fit the network.
        CheckpointError: The checkpoint is damaged.
        ConversionError: The network has parts without an integer form.
        Stopped: A signal came; the run is as it was.
    """
    console = console or Console()
    experiment = RunFolder(Path(workdir)).load_config()
    quant = experiment.quant if recipe is None else Recipe.preset(recipe)
    with claim(Path(workdir)) as folder, stop_on_signals() as stop, matmul_precision(experiment):
        if not folder.has_checkpoints("fp32"):
            raise RunFolderError(f"{folder.checkpoints('fp32')}: there are no checkpoints of fp32.")
        dataset = load_dataset(experiment.data)
        changed = _changed(experiment, quant, _check_batches(experiment, dataset, batches))
        networks = Networks.build(changed, dataset)
        fp32 = restore_model(networks, folder, "fp32")
        _check_trained(networks, folder)
        model = calibrated(networks, fp32)
        graph, tested = examine(networks, model, stop)
        tested["ptq"]["preset"] = recipe
        tested["ptq"]["verify"] = check_network(networks, model, graph, console).to_dict()
        results = _results_without(folder) or _float_results(networks, folder, model, command)
        stop.raise_if_set()
        save(graph, folder.ptq, overwrite=True)
        results = {**results, **tested, "speed": {**results["speed"], **tested["speed"]}}
        write_json(folder.results, results)
        report = write_report(folder.path)
    print_results(results, console)
    console.print(f"report: {report}", highlight=False)
    return results


def _check_batches(experiment: Experiment, dataset: Dataset, batches: int | None) -> int:
    there = len(dataset.train) // experiment.qat.batch_size
    if batches is None:
        return min(experiment.qat.calibration_batches, there)
    if not 1 <= batches <= there:
        raise DataError(
            f"batches must be in 1..{there}, the whole batches of {experiment.qat.batch_size} "
            f"(qat.batch_size) in {len(dataset.train)} training images, got {batches}."
        )
    return int(batches)  # The command's own integer type has no JSON form.


def _check_trained(networks: Networks, folder: RunFolder) -> None:
    run = StageRun("fp32", networks, folder, Evaluator(networks, "fp32"))
    with run.open_store(read_only=True) as store:
        done = max(store.steps())
    if done < run.total_steps:
        raise RunFolderError(
            f"{folder.path}: its FP32 stage is at step {done} of {run.total_steps}. Run the same "
            "`jaxqat train` again to train it to the end."
        )


def _results_without(folder: RunFolder) -> dict[str, Any] | None:
    """The results of a run whose QAT is done; None where there are none yet."""
    results = folder.read_results() if folder.results.exists() else {}
    return results if "qat" in results else None


def _float_results(
    networks: Networks, folder: RunFolder, model: Model, command: str | None
) -> dict[str, Any]:
    """What results say of a run that ends with FP32, its layers as they were calibrated."""
    dataset = networks.dataset
    of_float = {k: v for k, v in model.collections.items() if k in networks.shapes("fp32")[1]}
    logits = partial(Evaluator(networks, "fp32").logits, model.params, of_float)
    measured = {"fp32": measure(logits, dataset.test, dataset.class_names)}
    write_test_samples(folder, dataset)
    return {
        **describe_run(folder.load_config(), dataset, command),
        **describe_tests(measured, folder),
        **describe_network(networks, model.params, model.collections, None),
    }
