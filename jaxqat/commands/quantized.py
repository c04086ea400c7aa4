"""The quantized network that an integer network of a run was converted from.

`analyze` and `verify` both restore it, so that they speak of the same network.
"""

from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import Dataset
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.post_training import calibrated, experiment_of
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import Model, restore_model


def restore_quantized(
    folder: RunFolder, experiment: Experiment, dataset: Dataset, stage: str
) -> tuple[Networks, Model]:
    """Restore the quantized network of a stage, with its parameters and ranges.

    'qat' comes from its checkpoint. 'ptq' is the FP32 network, calibrated again: by the recipe and
    on the batches that RUN/ptq was made with, since `quantize` may have been told others than the
    run's config says. A run without RUN/ptq is calibrated by its config.

    Args:
        folder: Run folder.
        experiment: Experiment of the run.
        dataset: Data of the run.
        stage: 'qat' or 'ptq'.

    Raises:
        CheckpointError: The checkpoint is missing or damaged.
        ArtifactError: RUN/ptq is damaged.
    """
    if stage == "qat":
        networks = Networks.build(experiment, dataset)
        return networks, restore_model(networks, folder, "qat")
    if folder.ptq.is_dir():
        experiment = experiment_of(experiment, load_network(folder, "ptq"))
    networks = Networks.build(experiment, dataset)
    return networks, calibrated(networks, restore_model(networks, folder, "fp32"))
