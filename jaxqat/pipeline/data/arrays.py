"""Decode images to uint8 arrays and check them.

Every source decodes through this module, so a wrong shape or label is reported with its file or
split before anything is compiled.
"""

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxqat.errors import InputError

MAX_PIXELS = 2**26  # Of an image file: 8192x8192.


class DataError(InputError):
    """Unusable data; the message names the file or key, what was found and what was expected."""


class SourceMissingError(DataError):
    """The source is missing; a cache or a download may still provide the data."""


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
        """Return the number of images."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        """Return a copy of the images at `indices`, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """A whole decoded data set, before any validation split or limit.

    Attributes:
        train: The training split.
        test: The test split.
        class_names: Name of each class; its length is the number of classes.
        facts: Version, description and SHA-256 of the source files, as JSON values.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One image file or record, still encoded.

    Attributes:
        where: Its name in error messages: a file, or a split and an index.
        data: Bytes of the PNG, JPEG, ... file.
        label: Class of the image.
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
    """Decode `count` records into one array, with Pillow only.

    TFDS uses OpenCV where it is installed. Its JPEG pixels differ from Pillow's, so the same files
    would give different data on two machines.

    Args:
        where: Name of the split in error messages.
        records: The encoded images.
        count: Required number of records.
        channels: 1 (grey) or 3 (RGB).
        image_size: Height and width to resize to; None keeps the images as they are.
        num_classes: Labels must be in 0..num_classes - 1.

    Raises:
        DataError: If an image cannot be decoded or its shape differs from the first one's, a label
            is out of range, or there are more or fewer than `count` records.
    """
    images = np.empty((0, 0, 0, channels), np.uint8)
    labels = np.empty(count, np.int32)
    decoded = 0
    for record in records:
        if decoded == count:
            raise DataError(f"{where}: more than the expected {count} images.")
        pixels = decode_image(record, channels=channels, image_size=image_size)
        if decoded == 0:
            images = np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{record.where}: {_size(pixels.shape)} image, but the first one of {where} is "
                f"{_size(images.shape[1:])}. All must have one size: set data.image_size to resize."
            )
        if not 0 <= record.label < num_classes:
            raise DataError(
                f"{record.where}: label {record.label}, expected 0..{num_classes - 1} "
                f"({num_classes} classes)."
            )
        images[decoded], labels[decoded] = pixels, record.label
        decoded += 1
    if decoded != count or count == 0:
        raise DataError(f"{where}: {decoded} images, expected {count or 'at least 1'}.")
    return Split(images, labels)


def decode_image(
    record: Encoded, *, channels: int, image_size: int | None, grey_from_colour: bool = False
) -> np.ndarray:
    """Decode one image to uint8[height, width, channels].

    Images are turned as their EXIF orientation says; grey ones become RGB if `channels` is 3; what
    is transparent becomes white. So do browsers, and the page of `jaxqat export --format web`.

    Args:
        record: The encoded image.
        channels: 1 for grey images, 3 for RGB.
        image_size: Size to scale and crop it to; None keeps its size.
        grey_from_colour: Whether images in colour become grey if `channels` is 1 (ITU-R 601-2).

    Raises:
        DataError: If it is not an image, truncated, too large, not of 8 bits, or in colour where
            grey is expected.
    """
    try:
        with _open(io.BytesIO(record.data)) as image:
            image.load()
            mode = image.mode
            if mode.startswith(("I", "F")):
                raise DataError(f"{record.where}: pixels of mode {mode}; convert them to 8 bits.")
            if channels == 1 and mode not in ("1", "L") and not grey_from_colour:
                raise DataError(f"{record.where}: {mode} image in a grey data set, expected L.")
            turned = _on_white(ImageOps.exif_transpose(image))
            wanted = "L" if channels == 1 else "RGB"
            converted = turned if turned.mode == wanted else turned.convert(wanted)
            return _to_array(converted, image_size)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{record.where}: cannot be decoded: its {len(record.data)} bytes are no image that "
            "Pillow knows; expected a whole PNG or JPEG image."
        ) from error
    except Exception as error:  # Pillow raises many types on damage.
        raise DataError(
            f"{record.where}: cannot be decoded ({error}; {len(record.data)} bytes); "
            "expected a whole PNG or JPEG image. Fetch it again."
        ) from error


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))


@contextlib.contextmanager
def _open(source: Any) -> Iterator[Image.Image]:
    """Open an image of at most `MAX_PIXELS`; no pixel is decoded yet.

    Raises:
        ValueError: If it is larger. On damage, Pillow raises many other types.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(source)
    with image:
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
        yield image


def _to_array(image: Image.Image, image_size: int | None) -> np.ndarray:
    if image_size is not None and image.size != (image_size, image_size):
        # Scales the shorter side and crops the middle: keeps proportions, loses the margins.
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def is_grey(path: Path) -> bool:
    """Return whether an image file has one channel, by its header; False if it is not an image."""
    try:
        with _open(path) as image:
            return image.mode in ("1", "L")
    except Exception:  # `decode_image` names the file and the reason.
        return False


def resize_grey(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """Resize uint8[n, height, width, 1] images as `decode_image` does."""
    return np.stack([_to_array(Image.fromarray(image[..., 0]), image_size) for image in images])


def stratified_split(
    labels: np.ndarray, *, test_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into a train and a test part with the same share of every class.

    Each class gives round(test_fraction * its count) images to the test part, at least one.
    NumPy guarantees the stream of `RandomState`, so the split is the same in every version.

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
