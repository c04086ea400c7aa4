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
from jaxqat.integer._inputs import Input, arrays_of, check_batch, check_inputs
from jaxqat.integer._results import Output, check_places, flat
from jaxqat.integer._store.files import read_regular, write_atomically
from jaxqat.integer.graph import IntegerGraph

EXPORT_PLATFORMS = ("cpu", "cuda", "tpu")
_MAGIC = b"jaxqat.stablehlo.3"
_MAX_BYTES = 2**34


class StableHloNetwork:
    """An exported network, as a function from the model's inputs to its result.

    Attributes:
        description: Inputs, outputs, platforms and metadata, from `export_stablehlo`.
    """

    def __init__(self, exported: export.Exported, description: dict[str, Any]):
        self.description = description
        self._call: Callable[..., Any] = jax.jit(exported.call)
        self._inputs = [
            Input(shape=tuple(entry["shape"]), path=tuple(entry["path"]))
            for entry in description["inputs"]
        ]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the network's result, of the types in the description.

        Args:
            *arguments: The model's inputs, such as images.
            **keywords: Arrays that the model takes by keyword.

        Raises:
            ExportError: If an array is missing or does not have the file's shape or type.
        """
        try:
            given = arrays_of(self._inputs, arguments, keywords)
        except ValueError as error:
            raise ExportError(f"{error}.") from error
        types = [entry["dtype"] for entry in self.description["inputs"]]
        arrays = [self._checked(*each) for each in zip(self._inputs, types, given, strict=True)]
        try:
            check_batch(self._inputs, arrays)
        except ValueError as error:
            raise ExportError(f"{error}.") from error
        return self._call(*arrays)

    def _checked(self, each: Input, dtype: str, array: Any) -> Any:
        """Return the array of an input after a check of its type and shape."""
        array = np.asarray(array) if not hasattr(array, "dtype") else array
        batch = self.description["batch"]
        fits = array.shape[:1] == (batch,) or (batch is None and array.shape[:1] > (0,))
        if dtype == "int32" and jnp.issubdtype(array.dtype, jnp.integer):
            array = array.astype(dtype)  # NumPy's integers are int64.
        if tuple(array.shape[1:]) != each.shape or array.dtype.name != dtype or not fits:
            raise ExportError(
                f"{'images' if len(self._inputs) == 1 else f'input {each}'} must be {dtype} of the "
                f"shape ({batch or 'batch'}, {', '.join(map(str, each.shape))}), got "
                f"{array.dtype.name} {tuple(array.shape)}."
            )
        return array


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
    pixels = graph.takes_uint8 or all(each.type == "uint8" for each in graph.inputs)
    if input == "uint8" and not pixels:
        raise ExportError(
            "input 'uint8' needs a network that was converted with `preprocess`; use 'float'."
        )
    types = ["uint8" if input == "uint8" else each.type for each in graph.inputs]
    size = batch if batch is not None else export.symbolic_shape("batch")[0]
    arrays = [
        jax.ShapeDtypeStruct((size, *each.shape), jnp.dtype(dtype))
        for each, dtype in zip(graph.inputs, types, strict=True)
    ]
    program = jax.jit(_program(graph, tuple(platforms)))
    with _without_tracebacks():
        exported = export.export(program, platforms=platforms)(*arrays)
    description = {
        "inputs": [
            {"path": list(each.path), "shape": list(each.shape), "dtype": dtype}
            for each, dtype in zip(graph.inputs, types, strict=True)
        ],
        "batch": batch,
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
    """Return a function of the inputs that holds the weights once for all platforms."""
    by_name = {name: PLATFORMS[name](graph) for name in platforms}
    arrays = {p.name: {"weights": p.weights, "bias": p.bias} for p in graph.products()}

    def run(platform: Platform) -> Any:
        def on_platform(arrays: Any, *inputs: jax.Array) -> Any:
            parameters = platform.parameters_from(arrays)

            def apply(inputs: Sequence[jax.Array]) -> Any:
                return platform.result(platform.visit(inputs, parameters))

            return platform.batched(apply)(inputs)

        return on_platform

    def program(*inputs: jax.Array) -> Any:
        constants: Any = jax.tree.map(jnp.asarray, arrays)
        branches = {name: run(platform) for name, platform in by_name.items()}
        return lax.platform_dependent(constants, *inputs, **branches)

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
        given, made = description["inputs"], description["outputs"]
        check_inputs([Input(shape=(), path=tuple(entry["path"])) for entry in given])
        sizes = {str(x.shape[0]): x.shape[0] for x in exported.in_avals}
        (size,) = sizes.values()  # Symbolic or a number.
        outputs = [Output(name="", shape=(), path=tuple(entry["path"])) for entry in made]
        check_places([output.path for output in outputs])
        result = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        results = flat(outputs, result)
        batch = size if isinstance(size, int) else None
        avals = [*exported.in_avals, *results]
        wanted = [batch, list(exported.platforms), len(exported.in_avals)]
        wanted += [[list(x.shape[1:]), x.dtype.name] for x in avals]
        found = [description["batch"], description["platforms"], len(given)]
        found += [[entry["shape"], entry["dtype"]] for entry in (*given, *made)]
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
    if not content.endswith(_MAGIC) and content[: -len(b"3")].endswith(_MAGIC[:-1]):
        raise ExportError(f"{path}: was written by another version of jaxqat; export it again.")
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
