"""Convert, save, load, test and verify the integer networks of a run.

RUN/integer holds that of QAT, RUN/ptq/RECIPE those of post-training quantization (PTQ).
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import jaxqat
from jaxqat.errors import ArtifactError, RunError
from jaxqat.integer._compare import Verification
from jaxqat.integer._convert.convert import convert
from jaxqat.integer._store.folder import load, save
from jaxqat.integer._verify import verify
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline import config as configs
from jaxqat.pipeline.data import Dataset, Split
from jaxqat.pipeline.display import warn
from jaxqat.pipeline.evaluation import Measured, Predictor, measure
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.progress import Work
from jaxqat.pipeline.recipes import recipe_name
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.snapshots import Model, check_same_data
from jaxqat.quant import Recipe

# Pixels of a batch that is verified: of 100 images of 32x32 pixels, each of which needs a few MB
# for the codes and float values of all tensors.
VERIFY_PIXELS = 100 * 32 * 32


class DamagedNetworkError(ArtifactError, RunError):
    """The integer network of a run is damaged; as for all damage, the exit status is 1."""


def make_network(networks: Networks, folder: RunFolder, model: Model) -> IntegerGraph:
    """Convert the network of QAT, save it in RUN/integer, and load it from there.

    Args:
        networks: Networks of the experiment.
        folder: The run folder; an existing integer network is replaced.
        model: The trained network.

    Raises:
        ConversionError: Lists each part of the network that has no integer form, and the reason.
        ArtifactError: If it cannot be written.
    """
    return load(save(convert_network(networks, model, stage="qat"), folder.integer, overwrite=True))


def save_ptq(folder: RunFolder, graph: IntegerGraph) -> None:
    """Save an integer network of PTQ beside those by other recipes.

    Raises:
        ArtifactError: If it cannot be written.
    """
    name: Any = graph.metadata["ptq"]
    try:
        folder.ptq.mkdir(exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder.ptq}: cannot be made: {error.strerror}.") from error
    save(graph, folder.ptq / name, overwrite=True)


def convert_network(networks: Networks, model: Model, *, stage: str, **more: Any) -> IntegerGraph:
    """Convert a trained or calibrated network; add its origin as metadata.

    Args:
        networks: Networks of the experiment.
        model: Parameters, statistics and ranges.
        stage: 'qat' or 'ptq'.
        **more: Further metadata.

    Raises:
        ConversionError: Lists each part of the network that has no integer form, and the reason.
    """
    return convert(
        networks.quantized,
        model.tree(),
        networks.one_image(),
        preprocess=networks.normalize,
        metadata={**_metadata(networks, model.step), "stage": stage, **more},
        # The ResNet has no part without an integer form; another network may, in float islands.
        strict=networks.experiment.model.target is None,
        train=False,
    )


def _metadata(networks: Networks, step: int) -> dict[str, Any]:
    """Return the names of the classes and the origin of the network."""
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


def measure_network(
    networks: Networks, graph: IntegerGraph, what: str, console: Console
) -> Measured:
    """Return scores and speed of an integer network on the test split."""
    dataset, batch_size = networks.dataset, networks.experiment.evaluation_batch_size
    predictor = Predictor.of_graph(graph, batch_size)
    return measure(predictor, dataset.test, dataset.class_names, what=what, console=console)


def check_network(
    networks: Networks, model: Model, graph: IntegerGraph, console: Console
) -> Verification:
    """Compare an integer network with its quantized network on the test split; print failures."""
    verification = verify_network(networks, model, graph, networks.dataset.test, console)
    for failure in verification.failures:
        warn(f"the integer network differs from the quantized one: {failure}.", console)
    return verification


def verify_network(
    networks: Networks,
    model: Model,
    graph: IntegerGraph,
    split: Split,
    console: Console | None = None,
) -> Verification:
    """Compare every code of the quantized network, in inference mode, with the integer network.

    Args:
        networks: Networks of the experiment.
        model: The quantized network that was converted.
        graph: The integer network.
        split: Images to compare them on.
        console: Shows the progress.
    """
    with verifying(split, console) as work:
        return verify(
            networks.quantized,
            model.tree(),
            graph=graph,
            batches=work.track(in_batches(split)),
            preprocess=networks.normalize,
            train=False,
        )


def verifying(split: Split, console: Console | None) -> Work:
    """Return the progress of a comparison on a split."""
    return Work(console, f"verifying every code on {len(split):,} images", len(split))


def in_batches(split: Split) -> Iterator[np.ndarray]:
    """Yield the images of a split in batches, without padding."""
    size = max(1, VERIFY_PIXELS // math.prod(split.images.shape[1:3]))
    for start in range(0, len(split), size):
        yield split.images[start : start + size]


def check_recipe(stage: str, recipe: str | None) -> None:
    """Refuse the name of a recipe for a stage that has only one.

    Raises:
        RunFolderError: The stage is not 'ptq'.
    """
    if recipe is not None and stage != "ptq":
        raise RunFolderError(
            f"--recipe chooses a network of --stage ptq, and the stage is {stage}."
        )


def network_folder(folder: RunFolder, stage: str, recipe: str | None = None) -> Path:
    """Return the folder of a stage's integer network.

    Args:
        folder: The run folder.
        stage: 'qat' (RUN/integer) or 'ptq' (RUN/ptq/RECIPE).
        recipe: Name of the recipe of PTQ; None for that of the run, or for the only one.

    Raises:
        RunFolderError: If there is none, or several of which none is chosen.
    """
    check_recipe(stage, recipe)
    if stage == "qat":
        if not folder.integer.is_dir():
            raise _no_network(folder, "integer", _why_not_converted(folder))
        return folder.integer
    names, own = folder.ptq_names(), recipe_name(folder.load_config().quant)
    if recipe is None and len(names) > 1 and own not in names:
        raise RunFolderError(
            f"{folder.ptq}: holds several networks ({', '.join(names)}): choose one by --recipe."
        )
    name = recipe or (own if own in names or not names else names[0])
    if name not in names:
        found = f"; there are {', '.join(names)}" if names else ""
        raise _no_network(folder, f"ptq/{name}", f"{_quantize(folder, name)} creates it{found}.")
    return folder.ptq / name


def _no_network(folder: RunFolder, name: str, reason: str) -> RunFolderError:
    return RunFolderError(f"{folder.path}: holds no integer network ({name}/): {reason}")


def _quantize(folder: RunFolder, name: str) -> str:
    """Return the command that makes a network of PTQ."""
    own = name == recipe_name(folder.load_config().quant)
    given = name if name in Recipe.presets() else f"{name}.yaml"
    return f"`jaxqat quantize {folder.path}{'' if own else f' --recipe {given}'}`"


def load_network(folder: RunFolder, stage: str = "qat", recipe: str | None = None) -> IntegerGraph:
    """Load the integer network of a stage from the run folder.

    Args:
        folder: The run folder.
        stage: 'qat' or 'ptq'.
        recipe: Name of the recipe of PTQ; None as in `network_folder`.

    Raises:
        RunFolderError: If the run has none; gives the reason.
        ArtifactError: If it is damaged.
    """
    path = network_folder(folder, stage, recipe)
    try:
        return load(path)
    except ArtifactError as error:
        again = "the same `jaxqat train`" if stage == "qat" else _quantize(folder, path.name)
        raise DamagedNetworkError(
            f"{error} To create the network again from the run's checkpoint, delete {path} and run "
            f"{again} again."
        ) from error


def check_network_data(folder: RunFolder, graph: IntegerGraph, dataset: Dataset) -> None:
    """Check that an integer network of a run was trained on this data.

    Raises:
        RunFolderError: If not; names what differs.
    """
    origin: Any = graph.metadata
    path = network_folder(folder, origin["stage"], origin.get("ptq"))
    check_same_data(str(path), origin["data"], dataset.fingerprint)


def _why_not_converted(folder: RunFolder) -> str:
    results = folder.find_results()
    if results is not None and results.conversion_error is not None:
        return f"the trained network could not be converted. {results.conversion_error}"
    if folder.has_checkpoints("qat"):
        return "run the same `jaxqat train` again: it resumes from the last checkpoint of QAT."
    return (
        "its network was never quantized: there is no checkpoint of QAT to convert. Run the same "
        "`jaxqat train` again to train it to the end."
    )


def is_finished(folder: RunFolder) -> bool:
    """Return whether a run is complete.

    A run without its integer network is not, unless the conversion failed: it is converted again.
    """
    results = folder.find_results()
    if results is None or results.qat is None:  # `quantize` writes results without QAT.
        return False
    return results.conversion_error is not None or folder.integer.is_dir()
