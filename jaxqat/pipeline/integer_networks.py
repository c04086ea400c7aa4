"""The integer networks of a run: made from the trained ones, tested, compared with them.

That of QAT is kept in RUN/integer, that of post-training quantization in RUN/ptq.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console

import jaxqat
from jaxqat.errors import ArtifactError
from jaxqat.integer._convert.convert import convert
from jaxqat.integer._store.folder import load, save
from jaxqat.integer._verify import Verification, verify
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.data import Dataset, Split
from jaxqat.pipeline.display import warn
from jaxqat.pipeline.evaluation import IntegerEvaluator, measure
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.snapshots import Model, check_same_data

# Images whose codes, and real values, of all tensors are held at a time: a few MB each.
VERIFIED_AT_A_TIME = 100


def make_network(networks: Networks, folder: RunFolder, model: Model) -> IntegerGraph:
    """Convert the trained network and keep it in the run folder.

    Args:
        networks: Of the experiment.
        folder: The run folder; a network that it holds already is replaced.
        model: The network that goes on from QAT.

    Returns:
        The integer network as it was read back from the folder: what is measured is what is there.

    Raises:
        ConversionError: Names every part of the network that has no integer form, and why.
        ArtifactError: It cannot be written.
    """
    return load(save(convert_network(networks, model, stage="qat"), folder.integer, overwrite=True))


def convert_network(networks: Networks, model: Model, *, stage: str, **more: Any) -> IntegerGraph:
    """The integer network of a trained or calibrated one, which it names in its metadata.

    Args:
        networks: Of the experiment.
        model: Parameters, statistics and ranges.
        stage: 'qat', or 'ptq'.
        **more: What its metadata say besides.

    Raises:
        ConversionError: Names every part of the network that has no integer form, and why.
    """
    return convert(
        networks.quantized,
        model.tree(),
        networks.one_image(),
        preprocess=networks.normalize,
        metadata={**_metadata(networks, model.step), "stage": stage, **more},
        train=False,
    )


def _metadata(networks: Networks, step: int) -> dict[str, Any]:
    """Which classes it tells apart, and where it comes from."""
    experiment, dataset = networks.experiment, networks.dataset
    described = {
        "name": experiment.name,
        "labels": dataset.class_names,
        "normalization": {"mean": dataset.mean, "std": dataset.std, "of": "pixels in 0..1"},
        "recipe": dataclasses.asdict(experiment.quant),
        "step": step,
        "seed": experiment.seed,
        "config_hash": configs.config_hash(experiment),
        "data": dataset.fingerprint,
        "made_with": {"jaxqat": jaxqat.__version__, "jax": jax.__version__},
    }
    return json.loads(json.dumps(described))


def measure_network(networks: Networks, graph: IntegerGraph) -> tuple[dict[str, Any], float]:
    """Metrics of an integer network on the test split, and images/s."""
    dataset, batch_size = networks.dataset, networks.experiment.evaluation_batch_size
    logits = IntegerEvaluator(graph, batch_size).logits
    return measure(logits, dataset.test, dataset.class_names)


def check_network(
    networks: Networks, model: Model, graph: IntegerGraph, console: Console
) -> Verification:
    """Compare an integer network, on the test split, with its origin; warn of failures."""
    verification = verify_network(networks, model, graph, networks.dataset.test)
    for failure in verification.failures:
        warn(f"the integer network is not the trained one: {failure}.", console)
    return verification


def verify_network(
    networks: Networks, model: Model, graph: IntegerGraph, split: Split
) -> Verification:
    """Compare every code of the trained network, in inference mode, with the integer network's.

    Args:
        networks: Of the experiment.
        model: What the integer network was made from.
        graph: The integer network.
        split: On which images.
    """
    return verify(
        networks.quantized,
        model.tree(),
        graph=graph,
        batches=in_batches(split),
        preprocess=networks.normalize,
        train=False,
    )


def in_batches(split: Split) -> Iterator[np.ndarray]:
    """The images of a split, a few at a time, none twice and none filled up."""
    for start in range(0, len(split), VERIFIED_AT_A_TIME):
        yield split.images[start : start + VERIFIED_AT_A_TIME]


def load_network(folder: RunFolder, stage: str = "qat") -> IntegerGraph:
    """An integer network of a run, from RUN/integer (stage 'qat') or RUN/ptq ('ptq') alone.

    Raises:
        RunFolderError: The run has none; says why.
        ArtifactError: It is damaged.
    """
    path, again = folder.integer, "the same `jaxqat train`"
    if stage == "ptq":
        path = folder.ptq
        again = f"`jaxqat quantize {folder.path}`"
    if not path.is_dir():
        reason = f"{again} makes it." if stage == "ptq" else _reason(folder)
        raise RunFolderError(f"{folder.path}: holds no integer network ({path.name}/): {reason}")
    try:
        return load(path)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error} To make the network again from the run's checkpoint, delete {path} and run "
            f"{again} again."
        ) from error


def check_network_data(folder: RunFolder, graph: IntegerGraph, dataset: Dataset) -> None:
    """Refuse data other than that an integer network of a run was trained on.

    Raises:
        RunFolderError: Names what differs.
    """
    origin: Any = graph.metadata
    path = folder.ptq if origin["stage"] == "ptq" else folder.integer
    check_same_data(str(path), origin["data"], dataset.fingerprint)


def _reason(folder: RunFolder) -> str:
    if folder.results.is_file():
        error = folder.read_results().get("integer", {}).get("error")
        if error is not None:
            return f"the trained network could not be converted. {error}"
    if folder.has_checkpoints("qat"):
        return "run the same `jaxqat train` again: it goes on from the last checkpoint of QAT."
    return (
        "its network was never quantized: there is no checkpoint of QAT to convert. Run the same "
        "`jaxqat train` again to train it to the end."
    )


def is_finished(folder: RunFolder) -> bool:
    """Whether nothing is left to do for a run.

    The run of an older version, which knew no integer networks, lacks one: it is gone on with as
    long as it has the checkpoint that the network is made from.
    """
    results = folder.read_results() if folder.results.exists() else {}
    if "qat" not in results:  # Post-training quantization leaves results of FP32 alone.
        return False
    answered = "error" in results.get("integer", {}) or folder.integer.is_dir()
    return answered or not folder.has_checkpoints("qat")
