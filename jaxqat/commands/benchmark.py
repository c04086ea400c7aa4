"""`jaxqat benchmark`: measure speed, print a table and write the measurements."""

import importlib.metadata
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from jaxqat.bench.checks import BenchmarkError
from jaxqat.bench.engines import engines_of, is_installed, platform
from jaxqat.bench.inference import benchmark_inference
from jaxqat.bench.libraries import LIBRARIES, benchmark_libraries
from jaxqat.bench.networks import CLASSES, IMAGE_SHAPE, WIDTH, random_network, run_pixels
from jaxqat.bench.table import print_benchmark
from jaxqat.bench.training import STEPS_PER_EPOCH, benchmark_training, random_dataset
from jaxqat.integer._store.files import write_json
from jaxqat.pipeline.config import Experiment
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.models import ModelConfig
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.results import to_json
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.run.results import environment
from jaxqat.pipeline.stages import StageRun, check_finished
from jaxqat.pipeline.terminal import tell

WHAT = ("inference", "train", "libraries")


def benchmark(
    run: Path | None = None,
    *,
    what: Literal["inference", "train", "libraries"] = "inference",
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 10,
    width: int | None = None,
    json: Path | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure inference or training speed on this machine, or compare libraries.

    Every round measures each engine once, so that a change of the machine's speed affects all.

    Args:
        run: Run folder; without one, a ResNet-18 with random weights on 32x32 images is measured.
        what: Inference in FP32, bfloat16 and integers with every installed engine (inference), a
            training step in FP32, bfloat16 and QAT (train), or a training step by AQT alone,
            jaxqat and, where it is installed, Qwix (libraries); the last trains the QAT stage of
            RUN by each of them and tests it.
        batch_sizes: Images per call; by default 1, 32, 256 (and 1024 on an accelerator), for
            training the batch size of the run. Only inference takes several.
        rounds: Number of rounds, 1 or more.
        width: Width of the random ResNet-18: channels of its first stage; by default 64.
        json: File for the measurements, beside the printed table.
        command: The command line, recorded in the file.
        console: Where the table is printed; None for standard output.

    Returns:
        The measurements, as written to the file.

    Raises:
        BenchmarkError: If an argument is invalid, or engines disagree.
        RunFolderError: If the folder is not a run folder or holds no integer network (for
            libraries, no FP32 checkpoint), or the file cannot be written.
        ArtifactError: If the integer network is damaged.
        DataError: If the run's data, which libraries are trained on, is missing or damaged.
        CheckpointError: If the FP32 checkpoint is damaged.
    """
    console = console or Console()
    if run is not None and width is not None:
        raise BenchmarkError(
            f"width is for the random ResNet-18 only, and {run} has its own network."
        )
    width = WIDTH if width is None else width
    _check(what, batch_sizes, rounds, width, json)
    load = _load_average()

    def log(text: str) -> None:
        tell(text, console, style="dim")

    measure = {"inference": _inference, "train": _training, "libraries": _libraries}[what]
    measured = measure(run, batch_sizes, rounds, width, log)
    result = {
        "what": what,
        "run": None if run is None else str(run),
        "command": command,
        "environment": to_json(environment()),
        "versions": versions(_packages(what)),
        "threads": thread_count(),
        "rounds": rounds,
        "load_average": None if load is None else {"before": load, "after": _load_average()},
        **measured,
    }
    print_benchmark(result, console)
    if json is not None:
        write_json(json, result, error=RunFolderError)
    return result


def _check(
    what: str, batch_sizes: Sequence[int] | None, rounds: int, width: int, json: Path | None
) -> None:
    if what not in WHAT:
        raise BenchmarkError(f"what must be one of {', '.join(WHAT)}, got {what!r}.")
    numbers = {"rounds": [rounds], "width": [width], "batch_sizes": batch_sizes or ()}
    for name, values in numbers.items():
        for value in values:
            if value < 1:
                raise BenchmarkError(f"{name} must be 1 or more, got {value!r}.")
    if what != "inference" and batch_sizes is not None and len(batch_sizes) > 1:
        raise BenchmarkError(
            f"batch_sizes must be one number for {what!r}, got {', '.join(map(str, batch_sizes))}."
        )
    # Checked here, because measuring takes minutes.
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise BenchmarkError(f"json must be a file in an existing folder, got {str(json)!r}.")
    if json is not None and not os.access(json.parent, os.W_OK):
        raise BenchmarkError(f"json must be in a writable folder, got {str(json)!r}.")


def _inference(run: Path | None, batch_sizes, rounds: int, width: int, log) -> dict[str, Any]:
    if run is None:
        log(f"making a ResNet-18 of width {width}")
        graph, pixels = random_network(width), None
    else:
        graph, pixels = load_network(_open(run), "qat"), run_pixels(run)
    return benchmark_inference(
        graph,
        threads=thread_count(),
        batch_sizes=batch_sizes,
        rounds=rounds,
        pixels=pixels,
        log=log,
    )


def _training(run: Path | None, batch_sizes, rounds: int, width: int, log) -> dict[str, Any]:
    experiment, shape, classes = _random_experiment(width), IMAGE_SHAPE, CLASSES
    if run is not None:
        folder = _open(run)
        experiment, graph = folder.load_config(), load_network(folder, "qat")
        shape, (classes,) = graph.input_shape, graph.output_shape
    return benchmark_training(
        experiment,
        image_shape=shape,
        classes=classes,
        batch_size=batch_sizes[0] if batch_sizes else None,
        rounds=rounds,
        log=log,
    )


def _libraries(run: Path | None, batch_sizes, rounds: int, width: int, log) -> dict[str, Any]:
    batch = batch_sizes[0] if batch_sizes else None
    folder = None if run is None else _open(run)
    if folder is None:
        experiment = _random_experiment(width)
        count = STEPS_PER_EPOCH * (batch or experiment.fp32.batch_size)
        dataset = random_dataset(IMAGE_SHAPE, CLASSES, count)
    else:
        experiment = folder.load_config()
        folder.check_checkpoints("fp32")  # Before the data is read.
        dataset = load_dataset(experiment.data)
    networks = Networks.build(experiment, dataset)
    if folder is not None:
        check_finished(StageRun.of("fp32", networks, folder))
    return benchmark_libraries(networks, folder=folder, batch_size=batch, rounds=rounds, log=log)


def _random_experiment(width: int) -> Experiment:
    return Experiment(name=f"ResNet-18, width {width}", model=ModelConfig(width=width))


def _open(run: Path) -> RunFolder:
    folder = RunFolder(Path(run))
    folder.load_config()
    return folder


def thread_count() -> int:
    """Return the number of processors that this process, and so each engine, may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package; None if it is not installed."""
    return {name: _version(name) if is_installed(name) else None for name in packages}


def _packages(what: str) -> list[str]:
    """Return the packages that a measurement depends on."""
    if what == "inference":
        return list(dict.fromkeys(engine.packages[0] for engine in engines_of(platform())))
    libraries = [library.package for library in LIBRARIES] if what == "libraries" else ["torch"]
    return ["jax", *libraries]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # The distribution has another name, such as onnxruntime-gpu.
        names = importlib.metadata.packages_distributions().get(package)
        return importlib.metadata.version(names[0]) if names else "unknown"


def _load_average() -> float | None:
    """Return the load average of the last minute; None if the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
