"""Downloads through TFDS, if the user has set data.download.

TFDS's builders for CIFAR need TensorFlow to unpack the archive and to read the files in it. The
builders here read the same archive, with TFDS's checksum, by Python's tarfile, and write the same
prepared copy. For other sets TFDS may need TensorFlow.
"""

import io
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxqat.pipeline.data.arrays import DataError

# TFDS retries an unreachable host for minutes; a reachable one answers in this time.
REACHABLE_SECONDS = 8


def download(name: str, root: Path) -> None:
    """Let TFDS download a set and prepare it as array_record below `root`.

    Raises:
        DataError: If TFDS does not know the set, or cannot fetch or prepare it.
    """
    try:
        if name in ("cifar10", "cifar100"):
            builder = cifar_builder(name)(data_dir=str(root), file_format="array_record")
        else:
            builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
    except Exception as error:  # An unknown name, or a builder whose imports are missing.
        raise DataError(f"data.name {name!r}: TFDS cannot build it: {error}") from error
    for url in list(builder.url_infos or {})[:1]:
        check_reachable(name, url)
    try:
        # Google's bucket of prepared sets holds TensorFlow's own record format only.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # Network, checksum, disk, a builder that needs TensorFlow.
        hint = ""
        if "tensorflow" in str(error):
            hint = (
                " TFDS needs TensorFlow to prepare this set: prepare it once where TensorFlow is "
                "installed, with file_format='array_record', and set data.data_dir to the result."
            )
        raise DataError(
            f"data.name {name!r}: TFDS could not download and prepare it in {root}: {error}.{hint}"
        ) from error


def check_reachable(name: str, url: str) -> None:
    """Raise DataError unless the host of `url` answers within `REACHABLE_SECONDS`."""
    outcome: list[str] = []  # A reason why not, or an empty one; nothing before an answer.

    def request_head() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=REACHABLE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # The host answers; TFDS reports what is wrong with the file.
        except (OSError, ValueError) as error:
            outcome.append(str(error))
            return
        outcome.append("")

    # In a thread, because name look-ups have no timeout.
    thread = threading.Thread(target=request_head, daemon=True)
    thread.start()
    thread.join(REACHABLE_SECONDS)
    reason = outcome[0] if outcome else f"no answer in {REACHABLE_SECONDS} s"
    if reason:
        raise DataError(
            f"data.name {name!r}: cannot download from {url}: {reason}. Connect to the network, or "
            "set data.data_dir to the root of a prepared TFDS copy."
        )


def cifar_builder(name: str) -> Any:
    """Return TFDS's builder class of 'cifar10' or 'cifar100', changed to need no TensorFlow."""
    parents = {
        "cifar10": tfds.image_classification.Cifar10,
        "cifar100": tfds.image_classification.Cifar100,
    }
    parent: Any = parents[name]

    # pyright does not know that TFDS's __init_subclass__ takes skip_registration.
    class CifarWithoutTensorFlow(parent, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        # TFDS looks for checksums beside the class's module; ours has none.
        url_infos = parent.url_infos

        def _split_generators(self, dl_manager):
            info = self._cifar_info
            archive = Path(dl_manager.download(info.url))
            files = _read_tar(archive, info.prefix)
            for key, file in zip(info.label_keys, info.label_files, strict=True):
                names = files[file].decode().split("\n")
                self.info.features[key].names = [name for name in names if name]
            return {
                "train": self._generate_examples("train_", [files[f] for f in info.train_files]),
                "test": self._generate_examples("test_", [files[f] for f in info.test_files]),
            }

        def _generate_examples(self, prefix, blobs) -> Iterator[tuple[int, dict[str, Any]]]:
            keys = self._cifar_info.label_keys
            # One record: one byte per label, then 32x32 pixels of each of three channels.
            size = len(keys) + 3 * 32 * 32
            records = np.concatenate([np.frombuffer(b, np.uint8).reshape(-1, size) for b in blobs])
            for index, record in enumerate(records):
                pixels = record[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
                labels = dict(zip(keys, map(int, record), strict=False))
                yield index, {**labels, "id": f"{prefix}{index:05d}", "image": _png(pixels)}

    CifarWithoutTensorFlow.name = name
    return CifarWithoutTensorFlow


def _read_tar(archive: Path, prefix: str) -> dict[str, bytes]:
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                files[member.name.removeprefix(prefix)] = content.read()
    return files


def _png(pixels: np.ndarray) -> io.BytesIO:
    """Encode a PNG file: TFDS stores it unchanged, but needs TensorFlow to encode an array."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    buffer.seek(0)
    return buffer
