"""The cache of decoded data sets: one .npz file and its SHA-256 an entry.

An entry is NAME-REQUEST-IDENTITY.npz. REQUEST is a hash of what was asked for (name, splits, image
size), IDENTITY one of the source files' content, so that two copies of "cifar10" never pass for
each other. Its checksum lies beside it in `sha256sum` form. Both are written to a temporary file
and renamed: a stopped process leaves the old entry or none. Entries may be deleted at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxqat.pipeline.data.arrays import DataError, Decoded, Split

logger = logging.getLogger(__name__)

# Part of every request's hash: increase it when what is decoded, or how it is stored, changes.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Cache:
    """The entries of one request.

    Attributes:
        directory: Where the entries lie; created at the first write.
        request: What is asked for, JSON-able; `request["name"]` begins the file name.
    """

    directory: Path
    request: dict[str, Any]

    @property
    def prefix(self) -> str:
        """Start of the file names of this request's entries, whatever copy they came from."""
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", self.request["name"])
        return f"{name}-{json_sha256({'format': FORMAT, **self.request})[:12]}"

    def path(self, identity: dict[str, Any]) -> Path:
        """File of the entry decoded from the source with this identity."""
        return self.directory / f"{self.prefix}-{json_sha256(identity)[:16]}.npz"

    def get_or_decode(self, identity: dict[str, Any], decode: Callable[[], Decoded]) -> Decoded:
        """The verified entry of this source, or else a fresh decoding, which is then stored.

        A damaged entry is said and replaced. A cache that cannot be written is said, and costs
        no more than a decoding at the next start.
        """
        path = self.path(identity)
        if path.exists():
            try:
                return read_entry(path)
            except DataError as error:
                logger.warning("%s Decoding the data again.", error)
        decoded = decode()
        try:
            write_entry(path, decoded)
        except OSError as error:
            logger.warning("cannot cache decoded data in %s: %s", self.directory, error)
        return decoded

    def only_entry(self) -> Decoded | None:
        """The one verified entry of this request, when the source itself is not at hand.

        Returns:
            None if there is no entry.

        Raises:
            DataError: If entries of different copies exist, or the only one is damaged.
        """
        paths = sorted(self.directory.glob(f"{self.prefix}-*.npz"))
        if len(paths) > 1:
            raise DataError(
                f"data.cache_dir holds {len(paths)} different copies of {self.request['name']!r} "
                f"({', '.join(map(str, paths))}) and the source is not at hand to choose by. "
                "Delete all but one, or set data.data_dir to the source."
            )
        return read_entry(paths[0]) if paths else None


def json_sha256(value: dict[str, Any]) -> str:
    """SHA-256 of a JSON-able value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def read_entry(path: Path) -> Decoded:
    """Read one entry after its checksum has been verified.

    Raises:
        DataError: If the checksum is missing or not that of the file.
    """
    checksum_path = _checksum_path(path)
    try:
        expected, arrived = checksum_path.read_text().split()[0], file_sha256(path)
    except (OSError, IndexError, UnicodeDecodeError) as error:
        raise DataError(
            f"{checksum_path}: the cache's checksum cannot be read ({error})."
        ) from error
    if arrived != expected:
        raise DataError(
            f"{path}: the cache is damaged: SHA-256 {arrived[:16]}…, expected {expected[:16]}…."
        )
    with np.load(path, allow_pickle=False) as arrays:
        meta = json.loads(arrays["meta"].tobytes())
        train, test = (
            Split(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in ("train", "test")
        )
    return Decoded(train, test, tuple(meta["class_names"]), meta["facts"])


def write_entry(path: Path, decoded: Decoded) -> None:
    """Write one entry and its checksum, each atomically."""
    meta = {"class_names": decoded.class_names, "facts": decoded.facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                train_images=decoded.train.images,
                train_labels=decoded.train.labels,
                test_images=decoded.test.images,
                test_labels=decoded.test.labels,
                meta=np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8),
            )
        digest = file_sha256(temporary)
    with _replacing(_checksum_path(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` if all went well, and is gone if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
