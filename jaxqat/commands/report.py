"""`jaxqat report`: write the report of a run again."""

from pathlib import Path

from rich.console import Console

from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.evaluation import Predictor
from jaxqat.pipeline.integer_networks import check_network_data, load_network
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.report import write_report
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.results import write_test_samples
from jaxqat.pipeline.run.snapshots import restore_model
from jaxqat.pipeline.terminal import say, tell


def report(run: Path, *, predict: bool = False, console: Console | None = None) -> Path:
    """Write RUN/report.html again from the files in the run folder.

    Args:
        run: Run folder.
        predict: Classify the test images again, by the FP32 and the integer network, to show them;
            for runs of older versions and for those whose report_data.npz is lost. It needs the
            data, the FP32 checkpoint and the integer network.
        console: Where the path of the report is printed; None for standard output.

    Returns:
        Path of the report.

    Raises:
        RunFolderError: If the folder is not a run folder, or lacks a network or its data.
        CheckpointError: If the checkpoint is damaged.
        ArtifactError: If the integer network is damaged.
        ReportError: If a file that the report needs is missing or broken.
    """
    console = console or Console()
    folder = RunFolder(Path(run))
    folder.load_config()
    if predict:
        tell("classifying the test images", console)
        _predict(folder)
    tell("drawing the report", console)
    page = write_report(folder.path)
    say(f"report: {page}", console)
    return page


def _predict(folder: RunFolder) -> None:
    """Write the images of the report again, with the predictions of both networks."""
    experiment, results = folder.load_config(), folder.read_results()
    stage, key = ("qat", "integer") if results.integer is not None else ("ptq", "ptq")
    graph = load_network(folder, stage)
    if stage == "ptq":
        key = f"ptq_{graph.metadata['ptq']}"
    dataset = load_dataset(experiment.data)
    check_network_data(folder, graph, dataset)
    with matmul_precision(experiment):
        networks = Networks.build(experiment, dataset)
        variables = restore_model(networks, folder, "fp32").tree()
        real = Predictor.of_stage(networks, "fp32").logits(dataset.test, variables)
    integer = Predictor.of_graph(graph, experiment.evaluation_batch_size).logits(dataset.test)
    write_test_samples(folder, dataset, results, {"fp32": real, key: integer})
