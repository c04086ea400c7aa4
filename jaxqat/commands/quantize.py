"""`jaxqat quantize`: quantize the FP32 network of a run without training."""

import dataclasses
from pathlib import Path

from rich.console import Console

from jaxqat.integer._store.folder import save
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import DataError, Dataset, load_dataset
from jaxqat.pipeline.display import print_results
from jaxqat.pipeline.evaluation import Predictor, measure
from jaxqat.pipeline.integer_networks import check_network
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import calibrated, convert_and_test, with_quantization
from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.results import Results
from jaxqat.pipeline.run.folder import RunFolder, claim
from jaxqat.pipeline.run.results import float_results, verification_result, write_test_samples
from jaxqat.pipeline.run.snapshots import Model, restore_model
from jaxqat.pipeline.stages import StageRun, check_finished
from jaxqat.pipeline.training import stop_on_signals
from jaxqat.quant import Recipe


def quantize(
    workdir: Path,
    *,
    batches: int | None = None,
    recipe: str | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> Results:
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
        dataset = load_dataset(experiment.data)
        batches = _check_batches(experiment, dataset, batches)
        networks = Networks.build(with_quantization(experiment, quant, batches), dataset)
        check_finished(StageRun.of("fp32", networks, folder))
        model = calibrated(networks, restore_model(networks, folder, "fp32"))
        graph, ptq, speed = convert_and_test(networks, model, stop, preset=recipe)
        verification = verification_result(check_network(networks, model, graph, console))
        ptq = dataclasses.replace(ptq, verify=verification)
        results = folder.find_results()
        if results is None or results.qat is None:
            results = _float_results(networks, folder, model, command)
        stop.raise_if_set()
        save(graph, folder.ptq, overwrite=True)
        results = results.adding("ptq", ptq, speed)
        folder.write_results(results)
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


def _float_results(
    networks: Networks, folder: RunFolder, model: Model, command: str | None
) -> Results:
    """Return the results of a run that ends with FP32, its layers as they were calibrated."""
    dataset, of_float = networks.dataset, {"params", *networks.shapes("fp32")[1]}
    variables = {name: value for name, value in model.tree().items() if name in of_float}
    predictor = Predictor.of_stage(networks, "fp32")
    measured = measure(
        lambda split: predictor.logits(split, variables), dataset.test, dataset.class_names
    )
    write_test_samples(folder, dataset)
    return float_results(networks, folder, model, measured, command)
