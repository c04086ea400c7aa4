"""Sources of images: scikit-learn's digits and a folder of images by class.

A source is first located, which reads directories and checksums but decodes nothing and needs no
network. It is decoded only if the cache does not hold it.
"""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxqat.pipeline.data.arrays import (
    DataError,
    Decoded,
    Encoded,
    SourceMissingError,
    Split,
    decode_split,
    is_grey,
    resize_grey,
    stratified_split,
)
from jaxqat.pipeline.hashing import file_sha256

logger = logging.getLogger(__name__)

# A source without a test split gives a fifth of each class to it, chosen by this seed.
TEST_FRACTION = 0.2
SPLIT_SEED = 0

MAX_FILE_BYTES = 2**28
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Source:
    """Data that was found and can be decoded.

    Attributes:
        identity: Identifies this copy: version and SHA-256 of its files, as JSON values.
        decode: Decodes both splits.
    """

    identity: dict[str, Any]
    decode: Callable[[], Decoded]


def content_sha256(root: Path, files: Iterable[Path]) -> str:
    """Return one SHA-256 over the names below `root` and the contents of files, in sorted order.

    Modification times do not count: a copied file is the same data.

    Raises:
        DataError: If a file cannot be read.
    """
    total = hashlib.sha256()
    for path in sorted(files):
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        line = f"{path.relative_to(root).as_posix()} {digest}\n"
        total.update(line.encode(errors="surrogateescape"))  # A name may be any bytes.
    return total.hexdigest()


def decode_digits(image_size: int | None) -> Decoded:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 grey, with a stratified test split.

    Values 0..16 become round(value * 255 / 16). scikit-learn contains the data: there are no files
    to find and none to cache.
    """
    from sklearn.datasets import load_digits  # Takes 0.5 s, and only this source needs it.

    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    whole = Split(resize_grey(images, image_size), bunch.target.astype(np.int32))
    train, test = stratified_split(whole.labels, test_fraction=TEST_FRACTION, seed=SPLIT_SEED)
    facts = {
        "version": "scikit-learn load_digits",
        "description": "Optical recognition of handwritten digits (UCI), 1,797 images of 8x8 grey "
        "pixels as scikit-learn embeds them; a stratified fifth is the test split.",
    }
    return Decoded(whole.take(train), whole.take(test), tuple("0123456789"), facts)


def locate_folder(
    root: Path, *, train_split: str, test_split: str, image_size: int | None
) -> Source:
    """Find a folder of images by class.

    The layout is ROOT/TRAIN_SPLIT/CLASS/... and ROOT/TEST_SPLIT/CLASS/..., or ROOT/CLASS/..., where
    a stratified fifth becomes the test split. Classes are numbered in the order of their names.

    Raises:
        SourceMissingError: If `root` does not exist.
        DataError: If only one of the split folders exists, their classes differ, there are fewer
            than two classes, or a class has too few images for both splits.
    """
    if not root.is_dir():
        raise SourceMissingError(f"data.data_dir: no folder {root}.")
    present = [name for name in (train_split, test_split) if (root / name).is_dir()]
    if len(present) == 1:
        raise DataError(
            f"{root}: has {present[0]!r}, but needs both {train_split!r} and {test_split!r} "
            "(data.train_split, data.test_split)."
        )
    bases = [root / name for name in present] or [root]
    listings = [_list_classes(base) for base in bases]
    if len(listings) == 1:
        _check_divisible(root, listings[0])
    classes = tuple(sorted(listings[0]))
    for base, listing in zip(bases, listings, strict=True):
        if tuple(sorted(listing)) != classes:
            difference = sorted(set(classes) ^ set(listing))
            raise DataError(f"{base}: classes differ from those of {bases[0]}: {difference}.")
    if len(classes) < 2:
        raise DataError(
            f"{bases[0]}: {len(classes)} class folders with images, expected 2 or more."
        )

    files = [path for listing in listings for paths in listing.values() for path in paths]
    identity = {
        "version": "folder",
        "description": f"{len(files)} images of {len(classes)} classes in a folder.",
        "source_sha256": content_sha256(root, files),
    }
    return Source(
        identity, lambda: _decode_folder(root, bases, listings, classes, image_size, identity)
    )


def _list_classes(base: Path) -> dict[str, list[Path]]:
    """Return the sorted image files of each class folder below `base`."""
    listing, ignored = {}, 0
    for folder in sorted(path for path in base.iterdir() if path.is_dir()):
        if folder.name.startswith("."):
            continue
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        listing[folder.name] = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        ignored += len(files) - len(listing[folder.name])
        if not listing[folder.name]:
            raise DataError(f"{folder}: a class without images ({', '.join(IMAGE_SUFFIXES)}).")
        _check_files(folder, listing[folder.name])
    if ignored:
        logger.warning("%s: ignored %d files that are not images.", base, ignored)
    return listing


def _check_files(folder: Path, files: Iterable[Path]) -> None:
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{os.fsencode(folder)!r}: the name of a class must be UTF-8. Rename the folder."
        ) from error
    for path in files:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise DataError(f"{path}: {size:,} bytes, more than {MAX_FILE_BYTES:,} for an image.")


def _check_divisible(root: Path, listing: dict[str, list[Path]]) -> None:
    for name, files in listing.items():
        if len(files) < 2:
            raise DataError(
                f"{root / name}: 1 image. A class needs 2 or more, one to train and one to test; "
                "or give one folder of classes for each split (data.train_split, data.test_split)."
            )


def _decode_folder(
    root: Path,
    bases: list[Path],
    listings: list[dict[str, list[Path]]],
    classes: tuple[str, ...],
    image_size: int | None,
    facts: dict[str, Any],
) -> Decoded:
    every_file = [path for listing in listings for paths in listing.values() for path in paths]
    channels = 1 if all(is_grey(path) for path in every_file) else 3

    def read(listing: dict[str, list[Path]]) -> Iterator[Encoded]:
        for label, name in enumerate(classes):
            for path in listing[name]:
                yield Encoded(str(path), path.read_bytes(), label)

    splits = [
        decode_split(
            str(base),
            read(listing),
            count=sum(map(len, listing.values())),
            channels=channels,
            image_size=image_size,
            num_classes=len(classes),
        )
        for base, listing in zip(bases, listings, strict=True)
    ]
    if len(splits) == 1:
        train, test = stratified_split(
            splits[0].labels, test_fraction=TEST_FRACTION, seed=SPLIT_SEED
        )
        splits = [splits[0].take(train), splits[0].take(test)]
    return Decoded(splits[0], splits[1], classes, facts)
