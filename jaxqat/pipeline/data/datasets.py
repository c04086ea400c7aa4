"""Load a data set by name: uint8 arrays, a validation split, statistics and a fingerprint."""

import dataclasses
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxqat.pipeline.data.arrays import DataError, Decoded, SourceMissingError, Split
from jaxqat.pipeline.data.cache import Cache
from jaxqat.pipeline.data.sources import Source, decode_digits, locate_folder
from jaxqat.pipeline.data.tfds_source import locate_tfds
from jaxqat.pipeline.settings.data import DataConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """All data of an experiment.

    Attributes:
        name: The name it was loaded by.
        train: Training images, without those of the validation split.
        validation: Images for selecting a checkpoint, or None.
        test: Images for the reported scores.
        class_names: Name of each class.
        mean: Mean of each channel over `train`, in units of 0..1.
        std: Standard deviation of each channel over `train`, in units of 0..1.
        fingerprint: Source, version, description, counts, shape and SHA-256 of the arrays, as JSON
            values. Equal fingerprints mean the same images in the same order.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.train.images.shape[1:]


def load_dataset(config: DataConfig) -> Dataset:
    """Load a data set from the verified cache or its source, and check it.

    The training images are permuted by `validation_seed`: the validation split is the end of that
    permutation, a limit keeps its beginning. Within a split, images stay in the source's order.

    Raises:
        DataError: If the data is missing, damaged or inconsistent.
    """
    decoded = _load_decoded(config)
    train, validation = _split_validation(decoded.train, config)
    test = _limit(decoded.test, config.test_limit, config.validation_seed)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"data.name {config.name!r}: training images of {train.images.shape[1:]}, test images "
            f"of {test.images.shape[1:]}; both must have one size: set data.image_size to resize."
        )
    mean, std = channel_statistics(train.images)
    if min(std) == 0:
        raise DataError(
            f"data.name {config.name!r}: a channel has one value in all training images "
            f"(mean {mean}, std {std}) and cannot be normalized."
        )
    splits = {"train": train, "validation": validation, "test": test}
    return Dataset(
        name=config.name,
        train=train,
        validation=validation,
        test=test,
        class_names=decoded.class_names,
        mean=mean,
        std=std,
        fingerprint=_fingerprint(config, decoded, splits),
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the population standard deviation of each channel, in units of 0..1.

    They are computed from the exact counts of the 256 values: a floating-point sum over 150 million
    pixels would depend on the order of summation.
    """
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1024):  # bincount needs 8 bytes per pixel.
        chunk = images[start : start + 1024]
        for channel in range(images.shape[-1]):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    values, pixels = np.arange(256), counts.sum(1)
    mean = counts @ values / pixels
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / pixels
    return tuple((mean / 255).tolist()), tuple((np.sqrt(variance) / 255).tolist())


def _load_decoded(config: DataConfig) -> Decoded:
    if config.name == "digits":
        return decode_digits(config.image_size)
    cache = Cache(cache_directory(config), _request(config))
    try:
        source = _locate(config)
    except SourceMissingError as missing:
        return _load_without_source(config, cache, missing)
    return cache.get_or_decode(source.identity, source.decode)


def _load_without_source(config: DataConfig, cache: Cache, missing: SourceMissingError) -> Decoded:
    """Return the cache's only copy; otherwise download the set, if allowed, or raise."""
    cache_state = f"There is no cache of it in {cache.directory} either."
    try:
        cached = cache.only_entry()
    except DataError as error:
        cached, cache_state = None, str(error)
    if cached is not None:
        logger.info("%s Using the verified cache in %s.", missing, cache.directory)
        return cached
    if config.name == "folder" or not config.download:
        raise DataError(f"{missing} {cache_state} {_advice(config)}") from missing

    from jaxqat.pipeline.data.tfds_download import download

    logger.warning("%s %s Downloading it.", missing, cache_state)
    download(config.name, _data_directory(config))
    source = _locate(config)
    return cache.get_or_decode(source.identity, source.decode)


def _locate(config: DataConfig) -> Source:
    directory = _data_directory(config)
    splits = {"train_split": config.train_split, "test_split": config.test_split}
    if config.name == "folder":
        return locate_folder(directory, **splits, image_size=config.image_size)
    return locate_tfds(config.name, directory, **splits, image_size=config.image_size)


def _request(config: DataConfig) -> dict[str, Any]:
    request = {
        key: getattr(config, key) for key in ("name", "train_split", "test_split", "image_size")
    }
    if config.name == "folder":
        request["folder"] = str(_data_directory(config).resolve())
    return request


def _data_directory(config: DataConfig) -> Path:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(config.data_dir or default).expanduser()


def cache_directory(config: DataConfig) -> Path:
    """Return the folder of decoded images."""
    default = os.environ.get("JAXQAT_CACHE_DIR") or "~/.cache/jaxqat"
    return Path(config.cache_dir or default).expanduser()


def _advice(config: DataConfig) -> str:
    if config.name == "folder":
        return "Set data.data_dir to a folder with one folder of images per class."
    return (
        "Set data.data_dir or TFDS_DATA_DIR to the root of a TFDS copy in array_record form, or "
        "data.download to true to let TFDS fetch it, or data.name to 'digits', which is embedded."
    )


def _split_validation(train: Split, config: DataConfig) -> tuple[Split, Split | None]:
    kept = len(train) - config.validation_size
    if kept < 1:
        raise DataError(
            f"data.validation_size must be in 0..{len(train) - 1}, for {len(train)} training "
            f"images, got {config.validation_size}."
        )
    if config.validation_size == 0:
        return _limit(train, config.train_limit, config.validation_seed), None
    order = np.random.RandomState(config.validation_seed).permutation(len(train))
    validation = train.take(np.sort(order[kept:]))
    return train.take(np.sort(order[:kept][: config.train_limit])), validation


def _limit(split: Split, limit: int | None, seed: int) -> Split:
    if limit is None or limit >= len(split):
        return split
    order = np.random.RandomState(seed).permutation(len(split))
    return split.take(np.sort(order[:limit]))


def _fingerprint(
    config: DataConfig, decoded: Decoded, splits: dict[str, Split | None]
) -> dict[str, Any]:
    present = {name: split for name, split in splits.items() if split is not None}
    return {
        "name": config.name,
        **decoded.facts,
        "source_splits": {"train": config.train_split, "test": config.test_split},
        "source_counts": {"train": len(decoded.train), "test": len(decoded.test)},
        "counts": {name: len(split) for name, split in present.items()},
        "image_shape": list(decoded.train.images.shape[1:]),
        "num_classes": len(decoded.class_names),
        "validation_seed": config.validation_seed,
        "sha256": {name: _split_sha256(split) for name, split in present.items()},
    }


def _split_sha256(split: Split) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(split.images).data)
    digest.update(split.labels.astype("<i4").data)
    return digest.hexdigest()
