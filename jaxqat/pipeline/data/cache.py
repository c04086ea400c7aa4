"""The cache of decoded data sets: each entry is an .npz file and its SHA-256.

An entry is named NAME-REQUEST-IDENTITY.npz. REQUEST is a hash of the request (name, splits, image
size), IDENTITY a hash of the source's version and files, so that two copies of "cifar10" are never
confused. A second file holds the checksum, in `sha256sum` form. Each is written atomically.
Entries can be deleted at any time.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxqat.integer._store.files import write_atomically
from jaxqat.pipeline.data.arrays import DataError, Decoded, Split
from jaxqat.pipeline.hashing import file_sha256, json_sha256

logger = logging.getLogger(__name__)

# Part of every request's hash: increase it when decoding or storage changes.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Cache:
    """The entries of one request.

    Attributes:
        directory: Folder of the entries; created at the first write.
        request: The request as JSON values; `request["name"]` begins the file name.
    """

    directory: Path
    request: dict[str, Any]

    @property
    def prefix(self) -> str:
        """Common start of the file names of this request's entries."""
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", self.request["name"])
        return f"{name}-{json_sha256({'format': FORMAT, **self.request})[:12]}"

    def path(self, identity: dict[str, Any]) -> Path:
        """Return the file of the entry decoded from the source with this identity."""
        return self.directory / f"{self.prefix}-{json_sha256(identity)[:16]}.npz"

    def get_or_decode(self, identity: dict[str, Any], decode: Callable[[], Decoded]) -> Decoded:
        """Return the verified entry of this source, or decode the source and store the result.

        A damaged entry is logged and replaced. Failure to write the cache only logs a warning.
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
        """Return the only entry of this request, verified; for use without the source.

        Returns:
            The entry; None if there is none.

        Raises:
            DataError: If entries of different copies exist, or the only one is damaged.
        """
        paths = sorted(self.directory.glob(f"{self.prefix}-*.npz"))
        if len(paths) > 1:
            raise DataError(
                f"data.cache_dir holds {len(paths)} different copies of {self.request['name']!r} "
                f"({', '.join(map(str, paths))}), and without the source none can be chosen. "
                "Delete all but one, or set data.data_dir to the source."
            )
        return read_entry(paths[0]) if paths else None


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def read_entry(path: Path) -> Decoded:
    """Read one entry and verify its checksum.

    Raises:
        DataError: If the checksum is missing or does not match the file.
    """
    checksum_path = _checksum_path(path)
    try:
        expected, actual = checksum_path.read_text().split()[0], file_sha256(path)
    except (OSError, IndexError, UnicodeDecodeError) as error:
        raise DataError(
            f"{checksum_path}: the cache's checksum cannot be read ({error})."
        ) from error
    if actual != expected:
        raise DataError(
            f"{path}: the cache is damaged: SHA-256 {actual[:16]}…, expected {expected[:16]}…."
        )
    with np.load(path, allow_pickle=False) as arrays:
        meta = json.loads(arrays["meta"].tobytes())
        train, test = (
            Split(arrays[f"{name}_images"], arrays[f"{name}_labels"]) for name in ("train", "test")
        )
    return Decoded(train, test, tuple(meta["class_names"]), meta["facts"])


def write_entry(path: Path, decoded: Decoded) -> None:
    """Write one entry and its checksum, each atomically.

    Raises:
        OSError: If either cannot be written.
    """
    meta = {"class_names": decoded.class_names, "facts": decoded.facts}
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(file: IO[bytes]) -> None:
        np.savez(
            file,
            allow_pickle=False,
            train_images=decoded.train.images,
            train_labels=decoded.train.labels,
            test_images=decoded.test.images,
            test_labels=decoded.test.labels,
            meta=np.frombuffer(json.dumps(meta, sort_keys=True).encode(), np.uint8),
        )

    write_atomically(path, save)
    write_atomically(_checksum_path(path), f"{file_sha256(path)}  {path.name}\n")
