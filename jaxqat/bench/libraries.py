"""Compare libraries that train a Flax network in 8 bits: what trains, on integers, how fast.

Each library quantizes the same network in the way its own documentation shows. All of them then
take the same training step, on the same images.
"""

import dataclasses
import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxqat.bench.engines import is_installed
from jaxqat.bench.timing import add_ratios, alternate, summarize
from jaxqat.bench.training import Trainer
from jaxqat.pipeline.evaluation import measure
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.post_training import calibrated
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import restore_model
from jaxqat.pipeline.stages import StageRun
from jaxqat.pipeline.training import Reporter, StopRequest, run_stage
from jaxqat.quant import QuantizedModule, Recipe, quantize
from jaxqat.quant._models.aqt_alone import AqtAlone, dense_configuration
from jaxqat.quant.aqt import AqtWarning

Log = Callable[[str], None]

# A product in StableHLO, with the types of its operands.
_PRODUCT = re.compile(
    r"stablehlo\.(?:dot_general|convolution).* : \(tensor<([^>]*)>, tensor<([^>]*)>\) ->"
)


@dataclasses.dataclass(frozen=True)
class Library:
    """A way to train a network.

    Attributes:
        key: Name in JSON.
        label: Displayed name.
        package: The package that it needs.
        make: Returns the network with quantized products, as a module with Linen's interface; it
            gets the float module and the experiment's recipe.
    """

    key: str
    label: str
    package: str
    make: Callable[[nn.Module, Recipe], Any]


def _by_configuration(module: nn.Module, recipe: Recipe) -> Any:
    del recipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AqtWarning)  # That is the difference to show.
        return quantize(module, dense_configuration())


def _by_qwix(module: nn.Module, recipe: Recipe) -> Any:
    qwix = importlib.import_module("qwix")
    del recipe
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    return qwix.quantize_model(module, qwix.QtProvider([rule]))


FLOAT = Library("float", "Flax FP32", "flax", lambda module, recipe: module)
LIBRARIES = (
    FLOAT,
    Library("aqt", "AQT", "aqt", lambda module, recipe: AqtAlone(module)),
    Library("jaxqat_aqt", "AQT by jaxqat", "jaxqat", _by_configuration),
    Library("jaxqat", "jaxqat", "jaxqat", quantize),
    Library("qwix", "Qwix", "qwix", _by_qwix),
)


def benchmark_libraries(
    networks: Networks,
    *,
    folder: RunFolder | None = None,
    batch_size: int | None = None,
    rounds: int = 10,
    log: Log = lambda text: None,
) -> dict[str, Any]:
    """Train a network one step by every library, and time it.

    Args:
        networks: The float network, the recipe and the data.
        folder: Run folder with a finished FP32 stage. Each library then trains the QAT stage from
            there, all with the same settings, and is tested on the test split.
        batch_size: Images per training step; None for the experiment's.
        rounds: Number of measurements of each library.
        log: Receives progress messages.

    Returns:
        The network and a table row for each library, as JSON values.

    Raises:
        RunFolderError: If there are no checkpoints, or the run was trained on other data.
        CheckpointError: If the checkpoint is damaged.
    """
    experiment = networks.experiment
    batch = batch_size or experiment.fp32.batch_size
    rows: list[dict[str, Any]] = []
    calls = {}
    for library in LIBRARIES:
        row: dict[str, Any] = {"key": library.key, "label": library.label}
        rows.append(row)
        if not is_installed(library.package):
            row["not_measured"] = f"{library.package} is not installed"
            continue
        log(f"compiling {library.label}")
        with matmul_precision(experiment):
            module = library.make(networks.modules["fp32"], experiment.quant)
            its = dataclasses.replace(networks, modules={**networks.modules, "qat": module})
            trainer = Trainer(_without_decay(its), "qat", batch, 1)
            row |= {**_trained(trainer), **count_products(its), **trainer.memory()}
            row["compile_s"] = trainer.compile_seconds
            calls[library.key] = trainer.call()
            if folder is not None:
                log(f"training {library.label}")
                row["accuracy"] = _accuracy(its, folder)
    log(f"{rounds} rounds of {len(calls)} steps")
    seconds = alternate(calls, rounds=rounds)
    for row in rows:
        if row["key"] in seconds:
            row |= summarize(seconds[row["key"]], batch)
    add_ratios(rows, {"ratio_to_float": FLOAT.key})
    return {
        "network": {"name": experiment.name, **dataclasses.asdict(experiment.model)},
        "recipe": dataclasses.asdict(experiment.quant),
        "image_shape": list(networks.dataset.image_shape),
        "batch_size": batch,
        "test_images": None if folder is None else len(networks.dataset.test),
        "qat_epochs": None if folder is None else experiment.qat.epochs,
        "libraries": rows,
    }


def _without_decay(networks: Networks) -> Networks:
    """Return networks whose training changes only weights that have a gradient."""
    fp32 = networks.experiment.fp32
    optimizer = dataclasses.replace(fp32.optimizer, weight_decay=0.0)
    experiment = dataclasses.replace(
        networks.experiment, fp32=dataclasses.replace(fp32, optimizer=optimizer)
    )
    return dataclasses.replace(networks, experiment=experiment)


def _trained(trainer: Trainer) -> dict[str, int]:
    """Count the kernels, and those that a training step changes."""
    leaves = jax.tree_util.tree_leaves_with_path(trainer.params)
    updates = trainer.first_update()
    changed = [
        bool(np.any(update))
        for (path, _), update in zip(leaves, updates, strict=True)
        if path[-1] == jax.tree_util.DictKey("kernel")
    ]
    return {"kernels": len(changed), "kernels_trained": sum(changed)}


def count_products(networks: Networks) -> dict[str, int]:
    """Count the products in the lowered forward pass of training, and those of int8 operands."""
    params, collections = networks.shapes("qat")
    forward, image = jax.jit(networks.forward("qat")), networks.one_image()
    lowered = forward.lower(params, collections, image, jax.random.key(0))
    operands = _PRODUCT.findall(lowered.as_text())
    integer = [pair for pair in operands if all(kind.endswith("xi8") for kind in pair)]
    return {"products": len(operands), "integer_products": len(integer)}


def _accuracy(networks: Networks, folder: RunFolder) -> float:
    """Train the QAT stage from the run's FP32 network; return the accuracy on the test split."""
    run = StageRun.of("qat", networks, folder)
    model = restore_model(networks, folder, "fp32")
    if isinstance(networks.modules["qat"], QuantizedModule):
        model = calibrated(networks, model)
    state = run.first_state(model)
    state = run_stage(run.plan(), state, reporter=Reporter(), stop=StopRequest())
    variables = {"params": state.params, **state.collections}
    dataset = networks.dataset
    measured = measure(run.predictor, dataset.test, dataset.class_names, variables)
    return measured.scores.accuracy
