# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Export of an integer network as StableHLO by `jax.export`: one file for CPU, CUDA and TPU.

The file is a program from `jax.export`, followed by a description and a checksum, which
`load_stablehlo` verifies. `jax.export.deserialize` reads the file too. Neither needs the model's
source.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jaxqat.errors import ExportError
from jaxqat.export._files import check_target
from jaxqat.integer._execute import Platform
from jaxqat.integer._execute.executor import PLATFORMS
from jaxqat.integer._guard import check_graph
from jaxqat.integer._results import Output, check_places, flat
from jaxqat.integer._store.files import read_regular, write_atomically
from jaxqat.integer.graph import IntegerGraph

EXPORT_PLATFORMS = ("cpu", "cuda", "tpu")
_MAGIC = b"jaxqat.stablehlo.2"
_MAX_BYTES = 2**34


class StableHloNetwork:
    """An exported network, as a function from images to its result.

    Attributes:
        description: Input, outputs, platforms and metadata, from `export_stablehlo`.
    """

    def __init__(self, exported: export.Exported, description: dict[str, Any]):
        self.description = description
        self._call: Callable[[Any], Any] = jax.jit(exported.call)

    def __call__(self, images: Any) -> Any:
        """Return the network's result, of the types in the description.

        Raises:
            ExportError: If the images do not have the file's input shape or type.
        """
        images = np.asarray(images) if not hasattr(images, "dtype") else images
        declared = self.description["input"]
        shape, dtype = tuple(declared["shape"]), declared["dtype"]
        batch = declared["batch"]
        fits = batch is None or images.shape[0] == batch
        if dtype != "uint8" and all(jnp.issubdtype(t, jnp.integer) for t in (dtype, images.dtype)):
            images = images.astype(dtype)  # NumPy's integers are int64.
        if tuple(images.shape[1:]) != shape or images.dtype.name != dtype or not fits:
            raise ExportError(
                f"images must be {dtype} of the shape ({batch or 'batch'}, "
                f"{', '.join(map(str, shape))}), got {images.dtype.name} {tuple(images.shape)}."
            )
        return self._call(images)


def export_stablehlo(
    graph: IntegerGraph,
    path: str | os.PathLike[str],
    *,
    input: Literal["float", "uint8"] = "float",
    platforms: Sequence[str] = EXPORT_PLATFORMS,
    batch: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an integer network as StableHLO, atomically.

    Args:
        graph: Network to export.
        path: File to write; its folder must exist.
        input: 'float' for the model's own input, float32 or integers; 'uint8' for raw images.
        platforms: Platforms that the file can run on, of 'cpu', 'cuda' and 'tpu'. CUDA uses cuDNN
            convolutions: a Pallas kernel cannot share a file with other platforms.
        batch: Images per call; None allows any number. On a CPU a fixed batch runs faster, because
            it is split into chunks that fit the cache.
        overwrite: Whether to replace an existing file.

    Returns:
        The path.

    Raises:
        ExportError: If `graph` is no integer network, the path cannot be used, a platform or the
            input is unknown, or the graph has no table for uint8 images.
    """
    check_graph(graph, "export_stablehlo", error=ExportError)
    path = Path(path)
    check_target(path, overwrite)
    unknown = [name for name in platforms if name not in EXPORT_PLATFORMS]
    if unknown or not platforms:
        raise ExportError(
            f"platforms must be among {', '.join(EXPORT_PLATFORMS)}, got {platforms!r}."
        )
    if input not in ("float", "uint8"):
        raise ExportError(f"input must be 'float' or 'uint8', got {input!r}.")
    if input == "uint8" and not graph.takes_uint8 and graph.input_type != "uint8":
        raise ExportError(
            "input 'uint8' needs a network that was converted with `preprocess`; use 'float'."
        )
    dtype = "uint8" if input == "uint8" else graph.input_type
    size = batch if batch is not None else export.symbolic_shape("batch")[0]
    images = jax.ShapeDtypeStruct((size, *graph.input_shape), jnp.dtype(dtype))
    program = jax.jit(_program(graph, tuple(platforms)))
    with _without_tracebacks():
        exported = export.export(program, platforms=platforms)(images)
    description = {
        "input": {"shape": list(graph.input_shape), "dtype": dtype, "batch": batch},
        "outputs": _described(graph, jax.tree.unflatten(exported.out_tree, exported.out_avals)),
        "platforms": list(platforms),
        "metadata": graph.metadata,
    }
    content = _sealed(bytes(exported.serialize()), description)
    write_atomically(path, content, error=ExportError)
    return path


def _described(graph: IntegerGraph, result: Any) -> list[dict[str, Any]]:
    avals = zip(graph.outputs, flat(graph.outputs, result), strict=True)
    return [
        {"path": list(output.path), "shape": list(output.shape), "dtype": aval.dtype.name}
        for output, aval in avals
    ]


@contextlib.contextmanager
def _without_tracebacks() -> Generator[None]:
    """Keep the folders of source files out of the exported program.

    Only the file name of each operation's source remains, so that the exported bytes do not depend
    on where the package is installed.
    """
    settings: dict[str, Any] = {
        "jax_include_full_tracebacks_in_locations": False,
        "jax_hlo_source_file_canonicalization_regex": r"^.*[/\\]",  # Removed from paths.
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _program(graph: IntegerGraph, platforms: tuple[str, ...]) -> Any:
    """Return a function from images to the result that holds the weights once for all platforms."""
    by_name = {name: PLATFORMS[name](graph) for name in platforms}
    arrays = {p.name: {"weights": p.weights, "bias": p.bias} for p in graph.products()}

    def run(platform: Platform) -> Any:
        def on_platform(images: jax.Array, arrays: Any) -> Any:
            parameters = platform.parameters_from(arrays)

            def apply(images: jax.Array) -> Any:
                return platform.result(platform.visit(images, parameters))

            return platform.batched(apply)(images)

        return on_platform

    def program(images: jax.Array) -> Any:
        constants: Any = jax.tree.map(jnp.asarray, arrays)
        branches = {name: run(platform) for name, platform in by_name.items()}
        return lax.platform_dependent(images, constants, **branches)

    return program


def load_stablehlo(path: str | os.PathLike[str]) -> StableHloNetwork:
    """Load a network from a file that `export_stablehlo` wrote.

    Raises:
        ExportError: If the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    try:
        content = read_regular(path, limit=_MAX_BYTES)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror or error}.") from error
    program, description = _opened(path, content)
    try:
        exported = export.deserialize(bytearray(program))
    except Exception as error:  # The reader of flatbuffers raises many types.
        reason = str(error) or type(error).__name__
        raise ExportError(f"{path}: this version of JAX cannot read it: {reason}") from error
    _check_description(path, description, exported)
    return StableHloNetwork(exported, description)


def _check_description(path: Path, description: Any, exported: export.Exported) -> None:
    """Check that a file's description is that of its program.

    Raises:
        ExportError: If not.
    """
    try:
        (images,) = exported.in_avals
        given, made = description["input"], description["outputs"]
        outputs = [Output(name="", shape=(), path=tuple(entry["path"])) for entry in made]
        check_places([output.path for output in outputs])
        result = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        results = flat(outputs, result)
        batch = images.shape[0] if isinstance(images.shape[0], int) else None
        wanted = [list(images.shape[1:]), images.dtype.name, batch, list(exported.platforms)]
        wanted += [[list(x.shape[1:]), x.dtype.name] for x in results]
        found = [given["shape"], given["dtype"], given["batch"], description["platforms"]]
        found += [[entry["shape"], entry["dtype"]] for entry in made]
        same = found == wanted and len(results) == len(exported.out_avals)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ExportError(f"{path}: its description is incomplete: {error!r}.") from error
    if not same or not isinstance(description.get("metadata"), dict):
        raise ExportError(f"{path}: its description does not fit its program.")


def _sealed(program: bytes, description: dict[str, Any]) -> bytes:
    """Join program, description, its length, the checksum of all three, and magic."""
    text = json.dumps(description).encode()
    body = program + text + len(text).to_bytes(8, "little")
    return body + hashlib.sha256(body).digest() + _MAGIC


def _opened(path: Path, content: bytes) -> tuple[bytes, dict[str, Any]]:
    """Split a file into program and description after checking the checksum."""
    if not content.endswith(_MAGIC):
        raise ExportError(f"{path}: is truncated, or was not written by `export_stablehlo`.")
    rest = content[: -len(_MAGIC)]
    body, digest = rest[:-32], rest[-32:]
    size = len(body) - 8 - int.from_bytes(body[-8:], "little")  # Of the program.
    if hashlib.sha256(body).digest() != digest or size < 0:
        raise ExportError(f"{path}: is damaged: its content does not match its checksum.")
    try:
        return body[:size], json.loads(body[size:-8])
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: its description is not JSON: {error}.") from error
