"""`jaxqat quantize`: quantize the trained FP32 network of a run without training."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

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
    run: Path,
    *,
    method: Literal["ptq"] = "ptq",
    batches: int | None = None,
    recipe: str | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Quantize the trained FP32 network of a run without training; evaluate and report it.

    Writes RUN/ptq, the entry 'ptq' of RUN/results.json and the report, each in one step and only
    after everything is measured. Before quantization-aware training the results hold FP32 and PTQ
    only; `train` continues such a run.

    Args:
        run: Run folder; its FP32 stage must be finished.
        method: Post-training quantization (ptq): activation ranges from a few training batches,
            weights as FP32 left them.
        batches: Number of training batches to calibrate on, 1 or more; by default
            qat.calibration_batches of the run.
        recipe: Preset to quantize by, such as int8_symmetric or w4a8; by default the recipe of the
            run.
        command: What was typed, recorded in the results of a run that has none yet.
        console: Where the results are printed; None for standard output.

    Returns:
        Content of RUN/results.json.

    Raises:
        RunFolderError: The folder is no run folder, its FP32 stage is not finished, another process
            trains in it, or it cannot be written.
        DataError: The data is missing, differs from the run's, or has too few batches.
        RecipeError: The recipe does not exist, or does not fit the network.
        CheckpointError: The checkpoint is damaged.
        ConversionError: Parts of the network have no integer form.
        Stopped: A signal arrived; the run is unchanged.
    """
    del method  # There is one only.
    console = console or Console()
    experiment = RunFolder(Path(run)).load_config()
    quant = experiment.quant if recipe is None else Recipe.preset(recipe)
    with claim(Path(run)) as folder, stop_on_signals() as stop, matmul_precision(experiment):
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
        results = _results_of_qat(folder) or _results_of_fp32(networks, folder, model, command)
        stop.raise_if_set()
        save(graph, folder.ptq, overwrite=True)
        results = {**results, **tested, "speed": {**results["speed"], **tested["speed"]}}
        write_json(folder.results, results)
        report = write_report(folder.path)
    print_results(results, console)
    console.print(f"report: {report}", highlight=False)
    return results


def _check_batches(experiment: Experiment, dataset: Dataset, batches: int | None) -> int:
    available = len(dataset.train) // experiment.qat.batch_size
    if batches is None:
        return min(experiment.qat.calibration_batches, available)
    if not 1 <= batches <= available:
        raise DataError(
            f"batches must be in 1..{available}, the whole batches of {experiment.qat.batch_size} "
            f"(qat.batch_size) in {len(dataset.train)} training images, got {batches}."
        )
    return batches


def _check_trained(networks: Networks, folder: RunFolder) -> None:
    """Refuse a run whose FP32 stage is not finished."""
    run = StageRun("fp32", networks, folder, Evaluator(networks, "fp32"))
    with run.open_store(read_only=True) as store:
        done = max(store.steps())
    if done < run.total_steps:
        raise RunFolderError(
            f"{folder.path}: its FP32 stage is at step {done} of {run.total_steps}. Run the same "
            "`jaxqat train` again to train it to the end."
        )


def _results_of_qat(folder: RunFolder) -> dict[str, Any] | None:
    """Return the results of a run whose QAT is finished; None before that."""
    results = folder.read_results() if folder.results.exists() else {}
    return results if "qat" in results else None


def _results_of_fp32(
    networks: Networks, folder: RunFolder, model: Model, command: str | None
) -> dict[str, Any]:
    """Return the results of a run that ends with FP32; its layers show the calibrated ranges."""
    dataset, collections = networks.dataset, dict(model.collections)
    ranges = collections.pop("quant")
    logits = partial(Evaluator(networks, "fp32").logits, model.params, collections)
    measured = {"fp32": measure(logits, dataset.test, dataset.class_names)}
    write_test_samples(folder, dataset)
    return {
        **describe_run(folder.load_config(), dataset, command),
        **describe_tests(measured, folder),
        **describe_network(networks, model.params, ranges, None),
    }
