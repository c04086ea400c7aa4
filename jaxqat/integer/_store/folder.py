# pyright: strict, reportUnknownMemberType=false
"""Saving the integer network as a folder: `graph.json`, `arrays.npz` and `SHA256SUMS`.

    jaxqat.save(graph, "network")       graph = jaxqat.load("network")

The folder appears complete or not at all. `load` checks the SHA-256 of each file before it reads
it (as does `sha256sum -c SHA256SUMS`). It needs no model and no checkpoint, and runs no code from
the files: arrays are read without pickle. It reads regular files only, and of `arrays.npz` no more
than the graph declares.
"""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path

import numpy as np

from jaxqat.errors import ArtifactError
from jaxqat.integer._guard import check_graph
from jaxqat.integer._store.arrays import read_arrays
from jaxqat.integer._store.codec import CodecError, decode_content, encode, parse, stored_sizes
from jaxqat.integer._store.files import read_regular, write_atomically
from jaxqat.integer.graph import IntegerGraph

GRAPH_FILE, ARRAYS_FILE, SUMS_FILE = "graph.json", "arrays.npz", "SHA256SUMS"
_FILES = {GRAPH_FILE, ARRAYS_FILE, SUMS_FILE}
_MAX_SUMS, _MAX_GRAPH = 2**12, 2**26
_MEMBER = 2**10  # Bytes of an archive's headers for one member, without its name.


def save(graph: IntegerGraph, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a graph as a folder.

    `load` restores it exactly, except that tuples in the metadata become lists.

    Args:
        graph: Network to save.
        folder: Folder to create; its parent must exist.
        overwrite: Whether to replace a network saved there before. The folder is absent for a
            moment during the replacement.

    Returns:
        The folder.

    Raises:
        ArtifactError: If `graph` is no integer network, the folder exists or cannot be written, or
            the metadata has no JSON form.
    """
    check_graph(graph, "save", error=ArtifactError)
    folder = Path(folder)
    try:
        text, arrays = encode(graph)
    except CodecError as error:
        raise ArtifactError(f"{folder}: the network cannot be saved: {error}") from error
    _check_target(folder, overwrite)
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    files = {GRAPH_FILE: text.encode(), ARRAYS_FILE: packed.getvalue()}
    files[SUMS_FILE] = _sums(files)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with _removed_on_exit(temporary):
            _write_folder(temporary, files)
            if overwrite and folder.exists():
                _replace(folder, temporary)
            else:
                temporary.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return folder


def load(folder: str | os.PathLike[str]) -> IntegerGraph:
    """Load a graph from a folder written by `save`.

    Raises:
        ArtifactError: If the folder holds no network or a damaged one; names the file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ArtifactError(
            f"{folder}: holds no integer network: it is a file, and `load` reads the folder that "
            "`jaxqat.save` wrote. ONNX Runtime runs ONNX files, `jaxqat.load_stablehlo` StableHLO."
        )
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: holds no integer network: there is no such folder.")
    sums = _read(folder / SUMS_FILE, _MAX_SUMS)
    files = {GRAPH_FILE: _read(folder / GRAPH_FILE, _MAX_GRAPH)}
    _check_sums(folder, sums, files)
    with _refused(folder / GRAPH_FILE, "is not a valid network"):
        content = parse(files[GRAPH_FILE].decode())
        sizes = stored_sizes(content)
        limit = sum(size + _MEMBER + 4 * len(name) for name, size in sizes.items()) + _MEMBER
    files[ARRAYS_FILE] = _read(folder / ARRAYS_FILE, limit)
    _check_sums(folder, sums, files)
    with _refused(folder / ARRAYS_FILE, "is not an archive of arrays"):
        arrays, others = read_arrays(files[ARRAYS_FILE], sizes)
    with _refused(folder / GRAPH_FILE, "is not a valid network"):
        graph = decode_content(content, arrays)
    if others:
        raise ArtifactError(f"{folder / ARRAYS_FILE}: {others[0]!r} is not an array of the graph.")
    return graph


@contextlib.contextmanager
def _refused(path: Path, problem: str) -> Generator[None]:
    """Turn whatever invalid content raises into one error that names the file."""
    try:
        yield
    except (CodecError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    except Exception as error:  # NumPy and zipfile raise many types, and so do wrong ranks.
        raise ArtifactError(f"{path}: {problem}: {error or type(error).__name__}") from error


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.parent.is_dir():
        raise ArtifactError(f"{folder}: the parent folder does not exist.")
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise ArtifactError(f"{folder}: already exists; give another name or pass overwrite=True.")
    # Never delete anything but a saved network.
    foreign = not folder.is_dir() or {path.name for path in folder.iterdir()} - _FILES
    if folder.is_symlink() or foreign:
        raise ArtifactError(
            f"{folder}: cannot be overwritten: it is not a folder with only the files of a saved "
            f"network ({', '.join(sorted(_FILES))})."
        )


@contextlib.contextmanager
def _removed_on_exit(folder: Path) -> Generator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # Left by a killed process with the same id.
    folder.mkdir()
    for name, content in files.items():
        write_atomically(folder / name, content)
    _sync(folder)


def _replace(folder: Path, new: Path) -> None:
    old = new.with_suffix(".old")
    with _removed_on_exit(old):
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise


def _sync(folder: Path) -> None:
    """Flush the names in a folder to disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit=limit)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: is missing.") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}.") from error


def _sums(files: Mapping[str, bytes]) -> bytes:
    """Return the checksums in the format of `sha256sum`."""
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return "".join(lines).encode()


def _check_sums(folder: Path, sums: bytes, files: Mapping[str, bytes]) -> None:
    """Compare the checksums as text, so that a changed byte in SUMS_FILE is detected too."""
    expected, actual = sums.splitlines(True), _sums(files).splitlines(True)
    compared = expected if ARRAYS_FILE in files else expected[:1]
    if compared == actual:
        return
    damaged = [name for name, line in zip(files, actual, strict=True) if line not in expected]
    names = " and ".join(str(folder / name) for name in damaged) or str(folder / SUMS_FILE)
    raise ArtifactError(f"{names}: damaged: content and SHA-256 in {folder / SUMS_FILE} differ.")
