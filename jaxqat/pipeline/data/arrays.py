"""Decoded splits as plain uint8 arrays, the checks on them, and the errors they raise.

Everything that reads data ends here, so that a wrong shape or label is reported by file or split
before anything is compiled.
"""

import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from jaxqat.errors import InputError


class DataError(InputError):
    """Data that cannot be used: names the file or key, what arrived and what would be right."""


class SourceMissingError(DataError):
    """The data is not where it was looked for; a cache or a download may still have it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes, in a fixed order.

    Attributes:
        images: uint8[n, height, width, channels].
        labels: int32[n], in 0..num_classes - 1.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        """The images at `indices`, in that order, as a copy."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A whole data set as its source stores it, before any validation split or limit.

    Attributes:
        train: The training split.
        test: The test split.
        class_names: Name of each class; its length is the number of classes.
        facts: What the data is, JSON-able: version, description, SHA-256 of the source files.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One image file or record, still encoded.

    Attributes:
        where: What to call it in an error: a file, or a split and an index.
        data: The bytes of the PNG, JPEG, ... file.
        label: Its class.
    """

    where: str
    data: bytes
    label: int


def decode_split(
    where: str,
    records: Iterable[Encoded],
    *,
    count: int,
    channels: int,
    image_size: int | None,
    num_classes: int,
) -> Split:
    """Decode `count` records into one array, by Pillow only.

    TFDS would take OpenCV when that happens to be installed, whose JPEG pixels differ from
    Pillow's: the same files would be different data on two machines.

    Args:
        where: What to call the split in an error.
        records: The encoded images.
        count: How many there must be.
        channels: 1 (grey) or 3 (RGB).
        image_size: Height and width to resize to; None keeps the images as they are.
        num_classes: Labels must be in 0..num_classes - 1.

    Raises:
        DataError: If an image cannot be decoded or is not shaped like the first one, a label is
            out of range, or there are more or fewer than `count` records.
    """
    images = np.empty((0, 0, 0, channels), np.uint8)
    labels = np.empty(count, np.int32)
    arrived = 0
    for record in records:
        if arrived == count:
            raise DataError(f"{where}: more than the {count} images it should have.")
        pixels = decode_image(record, channels=channels, image_size=image_size)
        if arrived == 0:
            images = np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{record.where}: {_size(pixels.shape)} image, but the first one of {where} is "
                f"{_size(images.shape[1:])}. All must be alike: set data.image_size to resize."
            )
        if not 0 <= record.label < num_classes:
            raise DataError(
                f"{record.where}: label {record.label}, expected 0..{num_classes - 1} "
                f"({num_classes} classes)."
            )
        images[arrived], labels[arrived] = pixels, record.label
        arrived += 1
    if arrived != count or count == 0:
        raise DataError(f"{where}: {arrived} images, expected {count or 'at least 1'}.")
    return Split(images, labels)


def decode_image(record: Encoded, *, channels: int, image_size: int | None) -> np.ndarray:
    """Decode one image to uint8[height, width, channels].

    Grey images become RGB where 3 channels are wanted, and transparency is dropped.

    Raises:
        DataError: If it is no image, truncated, not of 8 bits, or in colour where grey is wanted.
    """
    try:
        with Image.open(io.BytesIO(record.data)) as image:
            image.load()
            mode = image.mode
            if mode.startswith(("I", "F")):
                raise DataError(f"{record.where}: pixels of mode {mode}; convert them to 8 bits.")
            if channels == 1 and mode not in ("1", "L"):
                raise DataError(f"{record.where}: {mode} image in a grey data set, expected L.")
            wanted = "L" if channels == 1 else "RGB"
            converted = image if mode == wanted else image.convert(wanted)
            return _to_array(converted, image_size)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow reports a broken PNG as SyntaxError, everything else as OSError.
        raise DataError(
            f"{record.where}: cannot be decoded ({error}; {len(record.data)} bytes); "
            "expected a whole PNG or JPEG image. Fetch it again."
        ) from error


def _to_array(image: Image.Image, image_size: int | None) -> np.ndarray:
    if image_size is not None and image.size != (image_size, image_size):
        # Scales the shorter side and crops the middle: shapes are kept, margins are lost.
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def is_grey(path: Path) -> bool:
    """Whether an image file's header says one channel; False for what is no image."""
    try:
        with Image.open(path) as image:
            return image.mode in ("1", "L")
    except OSError:
        return False


def resize_grey(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Resize uint8[n, height, width, 1] images as `decode_image` does."""
    return np.stack([_to_array(Image.fromarray(image[..., 0]), image_size) for image in images])


def stratified_split(
    labels: np.ndarray, *, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a train and a test part with the same share of every class.

    Each class gives round(test_fraction * its count) images to the test part, one at least.
    NumPy freezes the stream of `RandomState` for ever, so the split is the same in any version.

    Returns:
        Train and test indices, each ascending.
    """
    rng = np.random.RandomState(seed)
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        is_test[members[: max(1, round(test_fraction * len(members)))]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
