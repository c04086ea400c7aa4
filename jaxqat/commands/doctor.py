"""`jaxqat doctor`: examine the installation and this machine, and test every integer product.

JAX is imported by the tests only: versions that do not fit each other are told, too.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json as json_format
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement
from rich.console import Console

from jaxqat.pipeline.diagnosis import Diagnosis, Problem, TestedProduct, print_diagnosis
from jaxqat.pipeline.machine import integer_instructions, processor

if TYPE_CHECKING:
    from jaxqat.integer._self_test import Case, Computed, ProductCheck

PACKAGES = (
    *("jaxqat", "jax", "jaxlib", "flax", "aqtp", "numpy", "optax", "orbax-checkpoint"),
    *("tensorflow-datasets", "onnx", "onnxruntime", "openvino"),
)
ONNX_RUNTIME = "ONNX Runtime"
EXTRAS = ("", "train", "onnx", "openvino", "cuda", "tpu")  # Not those of developers.
FREE_BYTES = 2**28  # A checkpoint of a small network and a report.


@dataclasses.dataclass
class _Findings:
    """What is found on the way."""

    devices: tuple[str, ...] = ()
    executor: str = ""
    compilation_cache: str | None = None
    folders: dict[Path, int] = dataclasses.field(default_factory=dict)  # Bytes that each needs.
    products: list[TestedProduct] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)


def doctor(
    run: Path | None = None,
    *,
    stage: Literal["qat", "ptq"] = "qat",
    recipe: str | None = None,
    json: bool = False,
    console: Console | None = None,
) -> Diagnosis:
    """Examine the installation and this machine, and test every integer product against NumPy.

    Prints versions, devices, support for integers, the compilation cache and free space. Then each
    shape of product is computed as in the integer network, as in training and, if it is installed,
    by ONNX Runtime, and each sum and code is compared with NumPy's. Says what is wrong and what to
    do; the exit status is 1 then. Writes nothing but JAX's compilation cache, if there is one.

    Args:
        run: Run folder, whose products are tested; without one, those of a small built-in set.
        stage: Stage that made the integer network: quantization-aware training (qat) or
            post-training quantization (ptq).
        recipe: Recipe of the network of post-training quantization, for a run with several; by
            default that of the run, or the only one.
        json: Print the findings as JSON on standard output, and all else on standard error.
        console: Where the findings are printed; None for standard output.

    Returns:
        The findings. Its `failures` say what is wrong.

    Raises:
        RunFolderError: If the folder is not a run folder, or holds no such integer network.
        ArtifactError: If the integer network is damaged.
    """
    console = console or Console(stderr=json)
    found, versions = _Findings(folders={run or Path.cwd(): FREE_BYTES}), _versions()
    _check_requirements(found)
    _examine(run, stage, recipe, found, console)
    free = {str(folder): _free(folder, needed, found) for folder, needed in found.folders.items()}
    diagnosis = Diagnosis(
        versions=versions,
        processor=processor(),
        instructions=integer_instructions(),
        devices=found.devices,
        executor=found.executor,
        compilation_cache=found.compilation_cache,
        free_bytes=free,
        products=tuple(found.products),
        notes=tuple(found.notes),
        problems=tuple(found.problems),
    )
    print_diagnosis(diagnosis, console)
    if json:
        print(json_format.dumps(dataclasses.asdict(diagnosis), indent=1))
    return diagnosis


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _check_requirements(found: _Findings) -> None:
    """Compare installed packages with the versions that jaxqat needs."""
    try:
        lines = importlib.metadata.requires("jaxqat") or ()
    except importlib.metadata.PackageNotFoundError:
        found.notes.append("jaxqat runs from a folder that pip did not install: the versions of "
                           "its packages are not checked")  # fmt: skip
        return
    for needed in map(Requirement, lines):
        if needed.marker and not any(needed.marker.evaluate({"extra": x}) for x in EXTRAS):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Without one that is always needed, nothing would run.
        if not needed.specifier.contains(version, prereleases=True):
            wanted = f"{needed.name}{needed.specifier}"
            found.problems.append(
                Problem(
                    what=f"{needed.name} {version} is installed, and jaxqat needs {wanted}",
                    repair=f"pip install '{wanted}'",
                )
            )


def _examine(
    run: Path | None, stage: str, recipe: str | None, found: _Findings, console: Console
) -> None:
    """Examine what needs JAX: devices, folders and products."""
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # Whatever versions that do not fit, or a driver, raise.
        repair = (
            "Install versions that fit each other: pip install --upgrade jax jaxlib (with the "
            "extra of your device, such as 'jax[cuda13]')."
        )
        found.problems.append(_unusable("JAX", error, repair))
        return
    try:
        from jaxqat.integer import _self_test as tests
        from jaxqat.integer._execute.executor import default_platform
        from jaxqat.pipeline.data.datasets import cache_directory
        from jaxqat.pipeline.integer_networks import load_network
        from jaxqat.pipeline.progress import Work
        from jaxqat.pipeline.run.folder import RunFolder
        from jaxqat.pipeline.settings.data import DataConfig
    except Exception as error:  # Of a package that does not fit this version of JAX, too.
        repair = (
            "Install the package that the error names in a version that fits the others, or jaxqat "
            "and all that it needs in a new environment."
        )
        found.problems.append(_unusable("jaxqat", error, repair))
        return
    graph, data = None, DataConfig()
    if run is not None:
        folder = RunFolder(Path(run))
        data = folder.load_config().data
        graph = load_network(folder, stage, recipe)
        found.folders[run] = max(FREE_BYTES, 2 * _largest_checkpoint(folder.path))
    found.devices = tuple(f"{each.platform}: {each.device_kind}" for each in devices)
    found.executor = default_platform()
    if devices[0].platform == "cpu" and Path("/dev/nvidiactl").exists():
        found.notes.append(
            "there is an NVIDIA GPU, and JAX uses the CPU: install 'jaxqat[cuda]', or look at "
            "JAX_PLATFORMS"
        )
    found.folders[cache_directory(data)] = FREE_BYTES
    config: Any = jax.config
    _check_compilation_cache(config.jax_compilation_cache_dir, found)
    cases = tests.built_in_cases() if graph is None else tests.cases_of(graph)
    ways = tests.jax_ways()
    if graph is None or graph.requantization == "float":
        _add_onnx_runtime(ways, found)
    else:
        found.notes.append(
            "this network has fixed-point multipliers: its sums are tested as it computes them, "
            "its codes with float multipliers, and ONNX Runtime is left out"
        )
    what = f"testing {len(cases)} shapes of products in {len(ways)} ways"
    with Work(console, what, len(cases) * len(ways), "products") as work:
        for case in cases:
            for name, way in ways.items():
                found.products.append(_tested(tests.check(case, name, way)))
                work.advance(1)
    found.problems += _wrong_products(found.products)


def _unusable(what: str, error: Exception, repair: str) -> Problem:
    text = f"{what} cannot be used: {type(error).__name__}: {error}"
    return Problem(what=text.rstrip("."), repair=repair)


def _add_onnx_runtime(ways: dict[str, Any], found: _Findings) -> None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        found.notes.append(f"not tested in {ONNX_RUNTIME}: {' and '.join(missing)} not installed")
        return
    ways[ONNX_RUNTIME] = _in_onnx_runtime


def _in_onnx_runtime(case: "Case") -> "Computed":
    """Compute a product as an exported file does in ONNX Runtime."""
    import numpy as np

    from jaxqat.export._onnx.model import onnx_model
    from jaxqat.export._onnx.runtime import make_runner
    from jaxqat.integer import _numpy_products as exact
    from jaxqat.integer._self_test import Computed

    graph = case.graph(requantized=case.out is not None)
    model = onnx_model(graph)
    result, codes = make_runner(model.SerializeToString(), expose=True)(
        case.units.astype(np.float32)
    )
    (node,) = graph.products()
    if case.out is None:
        return Computed(pairs=[(exact.real(node, case.total), result)])
    return Computed(pairs=[(exact.codes(node, case.total, case.out), codes[case.out.name])])


def _tested(check: "ProductCheck") -> TestedProduct:
    fields = {field.name for field in dataclasses.fields(TestedProduct)} - {"kernel"}
    values = {name: getattr(check, name) for name in fields}
    return TestedProduct(kernel=_kernel(check.program), **values)


def _kernel(program: str) -> str:
    """Return what multiplies in a compiled program, such as 'u8 x s8 -> s32 (YNNPACK)'."""
    from jaxqat.lowering import kernels, products

    try:
        found = products(kernels(program)) if program else []
    except Exception:  # Another version of XLA may write its programs in another way.
        return ""
    return ", ".join(dict.fromkeys(f"{product.types} ({product.engine})" for product in found))


def _wrong_products(tested: list[TestedProduct]) -> Iterator[Problem]:
    for each in tested:
        if not each.differing and not each.error:
            continue
        layers = f" ({', '.join(each.layers)})" if each.layers else ""
        reason = each.error or (
            f"{each.differing:,} of {each.values:,} numbers are wrong, by up to {each.largest:,.0f}"
        )
        yield Problem(
            what=f"{each.way}: {each.shape}{layers}: {reason}".rstrip("."),
            repair=_repair(each.way),
        )


def _repair(way: str) -> str:
    if way == ONNX_RUNTIME:
        return (
            "Do not deploy with this version of ONNX Runtime on this processor: install another "
            "one (pip install 'onnxruntime!=VERSION'), and report it there."
        )
    if way == "fast training":
        return "Train with --compilation default, and without `jaxqat.jit_step`."
    return (
        "Neither train nor deploy with this version of jaxlib on this device: install another one "
        "(pip install 'jax!=VERSION'), and report it there."
    )


def _check_compilation_cache(folder: str | None, found: _Findings) -> None:
    found.compilation_cache = folder
    if folder is None or "://" in folder:
        return
    found.folders[Path(folder)] = FREE_BYTES
    existing = _existing(Path(folder))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        found.problems.append(
            Problem(
                what=f"{folder}: compiled programs cannot be kept there: it is no folder that can "
                "be written",
                repair="Set JAX_COMPILATION_CACHE_DIR to one that can.",
            )
        )


def _existing(path: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _free(folder: Path, needed: int, found: _Findings) -> int:
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        found.problems.append(
            Problem(
                what=f"{folder}: {free:,} bytes are free there, and {needed:,} may be needed",
                repair="Delete files there, or use a folder on another disk.",
            )
        )
    return free


def _largest_checkpoint(run: Path) -> int:
    steps = run.glob("checkpoints/*/*")
    sizes = (sum(p.stat().st_size for p in step.rglob("*") if p.is_file()) for step in steps)
    return max(sizes, default=0)
