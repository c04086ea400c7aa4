"""`jaxqat quantize`: quantize the trained FP32 network of a run without training."""

import dataclasses
from pathlib import Path
from typing import Literal

from rich.console import Console

from jaxqat.pipeline.advice import analyze_for_advice, is_worse, print_advice
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import DataError, Dataset, load_dataset
from jaxqat.pipeline.display import print_results
from jaxqat.pipeline.evaluation import Measured, Predictor, measure
from jaxqat.pipeline.integer_networks import check_network, save_ptq
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import (
    calibrated,
    check_static,
    convert_and_test,
    warn_unconverged,
    with_quantization,
)
from jaxqat.pipeline.recipes import recipe_of_ptq
from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.results import Results
from jaxqat.pipeline.run.folder import RunFolder, claim
from jaxqat.pipeline.run.results import float_results, verification_result, write_test_samples
from jaxqat.pipeline.run.snapshots import Model, restore_model
from jaxqat.pipeline.stages import StageRun, check_finished
from jaxqat.pipeline.terminal import say, tell
from jaxqat.pipeline.training import stop_on_signals


def quantize(
    run: Path,
    *,
    method: Literal["ptq"] = "ptq",
    batches: int | None = None,
    recipe: str | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> Results:
    """Quantize the trained FP32 network of a run without training; evaluate and report it.

    Writes RUN/ptq/RECIPE, its entry in RUN/results.json and the report, each atomically and only
    after all measurements. Networks of other recipes stay beside it. Before quantization-aware
    training, the results hold only FP32 and PTQ; `train` continues such a run.

    Args:
        run: Run folder; its FP32 stage must be finished.
        method: Post-training quantization (ptq): activation ranges from a few training batches,
            weights from FP32.
        batches: Number of training batches to calibrate on, 1 or more; by default
            qat.calibration_batches of the run.
        recipe: Preset, such as int8_symmetric or w4a8, or a YAML file with the settings of `quant`,
            whose network is kept by the file's name; by default the recipe of the run.
        command: The command line, recorded in the results if it creates them.
        console: Where the results are printed; None for standard output.

    Returns:
        Content of RUN/results.json.

    Raises:
        RunFolderError: If the folder is not a run folder, its FP32 stage is not finished or was
            trained on other data, another process trains in it, or it cannot be written.
        DataError: If the data is missing or damaged, or has too few batches.
        RecipeError: If the recipe does not exist or does not fit the network.
        CheckpointError: If the checkpoint is damaged.
        ConversionError: If parts of the network have no integer form.
        Stopped: If a signal came while the network and its results were written; they are complete.
    """
    del method  # There is only one.
    console = console or Console()
    experiment = RunFolder(Path(run)).load_config()
    name, quant = recipe_of_ptq(recipe, experiment.quant)
    check_static(quant, name)
    with claim(Path(run)) as folder, matmul_precision(experiment):
        tell(f"data: loading {experiment.data.name}", console)
        dataset = load_dataset(experiment.data)
        batches = _check_batches(experiment, dataset, batches)
        networks = Networks.build(with_quantization(experiment, quant, batches), dataset)
        check_finished(StageRun.of("fp32", networks, folder))
        fp32 = restore_model(networks, folder, "fp32")
        tell(f"PTQ ({name}): calibrating on {batches} batches, converting and testing", console)
        if name in folder.ptq_names():
            tell(f"PTQ ({name}): this replaces the earlier network in {folder.ptq / name}", console)
        warn_unconverged(networks, fp32, console)
        model = calibrated(networks, fp32, console)
        graph, ptq, speed, logits = convert_and_test(networks, model, name=name, console=console)
        verification = verification_result(check_network(networks, model, graph, console))
        ptq = dataclasses.replace(ptq, verify=verification)
        results, tested = folder.find_results(), None
        if results is None or results.qat is None:
            tested = _test_float(networks, model, console)
            results = float_results(networks, folder, model, tested, command)
        results = results.with_ptq(name, ptq, speed)
        with stop_on_signals() as stop:
            stop.listen()  # The network and its results belong together.
            save_ptq(folder, graph)
            if tested is not None:  # Otherwise the report shows the images of QAT's network.
                by_key = {"fp32": tested.logits, f"ptq_{name}": logits}
                write_test_samples(folder, dataset, results, by_key)
            folder.write_results(results)
        tell("writing the report", console)
        report = write_report(folder.path)
        analysis = None
        if is_worse(results.fp32.test.accuracy, ptq.test.accuracy):
            analysis = analyze_for_advice(networks, model, console)
    reestimated = experiment.qat.reestimate_batch_norm
    print_results(results, console, reestimated=reestimated)
    say(f"report: {report}", console)
    if analysis is not None:
        print_advice(analysis, quant, console, f"jaxqat quantize {folder.path}")
    return results


def _check_batches(experiment: Experiment, dataset: Dataset, batches: int | None) -> int:
    available = len(dataset.train) // experiment.qat.batch_size
    if batches is None:
        return min(experiment.qat.calibration_batches, available)
    if not 1 <= batches <= available:
        raise DataError(
            f"--batches must be in 1..{available}, the whole batches of "
            f"{experiment.qat.batch_size} (qat.batch_size) in {len(dataset.train)} training "
            f"images, got {batches}."
        )
    return batches


def _test_float(networks: Networks, model: Model, console: Console) -> Measured:
    """Test the FP32 network that a calibrated network was made from."""
    dataset, of_float = networks.dataset, {"params", *networks.shapes("fp32")[1]}
    variables = {name: value for name, value in model.tree().items() if name in of_float}
    predictor = Predictor.of_stage(networks, "fp32")
    return measure(
        predictor, dataset.test, dataset.class_names, variables, what="fp32", console=console
    )
