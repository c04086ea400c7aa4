"""TFDS image-classification sets in array_record form, read without TensorFlow.

A prepared copy is found by its directory, ROOT/NAME[/CONFIG]/VERSION. Asking TFDS for a set by name
may go online, and hangs without a network.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxqat.pipeline.data.arrays import (
    DataError,
    Decoded,
    Encoded,
    SourceMissingError,
    Split,
    decode_split,
)
from jaxqat.pipeline.data.sources import Source, content_sha256
from jaxqat.pipeline.settings.data import NAME

# Metadata that describes the data; other files are TFDS's bookkeeping.
METADATA = ("dataset_info.json", "features.json", "*.labels.txt")

# Encoded records in memory at a time.
CHUNK = 1000


def prepared_directory(name: str, root: Path) -> Path:
    """Return the directory of the newest version of a prepared set, or of the one in `name`.

    Raises:
        SourceMissingError: If there is none.
        DataError: If the set has several configurations and `name` chooses none.
    """
    parts = NAME.fullmatch(name)
    assert parts is not None  # DataConfig has checked it.
    base = root / parts["name"] / (parts["config"] or "")
    versions = [path.parent for path in base.glob("*/dataset_info.json")]
    if parts["version"]:
        versions = [path for path in versions if path.name == parts["version"]]
    if versions:
        return max(versions, key=_version_number)
    configs = sorted({path.parent.parent.name for path in base.glob("*/*/dataset_info.json")})
    if configs:
        raise DataError(
            f"data.name {name!r}: {base} holds the configurations {', '.join(configs)}; "
            f"choose one, as in '{parts['name']}/{configs[0]}'."
        )
    raise SourceMissingError(
        f"data.name {name!r}: no prepared copy at {base}/{parts['version'] or 'VERSION'}."
    )


def _version_number(path: Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in path.name.split("."))


def locate_tfds(
    name: str, root: Path, *, train_split: str, test_split: str, image_size: int | None
) -> Source:
    """Find a prepared TFDS set; check its files and their record counts.

    Raises:
        SourceMissingError: If there is no prepared copy below `root`.
        DataError: If its metadata or files are missing, damaged or not array_record.
    """
    directory = prepared_directory(name, root)
    info = _builder(directory).info
    files = {path for pattern in METADATA for path in directory.glob(pattern)}
    for split in (train_split, test_split):
        files |= _checked_files(directory, info, split)
    identity = {
        "version": str(info.version),
        "description": " ".join(info.description.split()),
        "source_sha256": content_sha256(directory, files),
    }
    return Source(
        identity, lambda: _decode_tfds(directory, (train_split, test_split), image_size, identity)
    )


def _builder(directory: Path) -> Any:
    import tensorflow_datasets as tfds  # Takes 0.7 s, and only this source needs it.

    try:
        builder = tfds.builder_from_directory(str(directory))
    except Exception as error:  # Errors of protobuf, json and TFDS's own parsers.
        raise DataError(
            f"{directory}: TFDS cannot read dataset_info.json and features.json ({error}). "
            "Fetch or prepare the data again."
        ) from error
    file_format = getattr(builder.info.file_format, "value", None)
    if file_format != "array_record":
        raise DataError(
            f"{directory}: prepared as {file_format}, expected array_record, which needs no "
            "TensorFlow. Prepare it again with file_format='array_record', or delete it and set "
            "data.download to true."
        )
    return builder


def _checked_files(directory: Path, info: Any, split: str) -> set[Path]:
    """Return the shards of a split, after checking each one's number of records."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{directory}: no split {split!r} (data.train_split, data.test_split); "
            f"it has {', '.join(sorted(info.splits))}."
        ) from error
    for instruction in instructions:
        path, expected = Path(instruction.filename), instruction.examples_in_shard
        if not path.is_file():
            raise DataError(f"{path}: missing; split {split!r} needs it. Fetch the data again.")
        # The reader of a damaged file does not raise: it counts 0 records.
        found = ArrayRecordReader(str(path)).num_records()
        if found != expected:
            raise DataError(
                f"{path}: {found} records in {path.stat().st_size} bytes, but dataset_info.json "
                f"says {expected}: truncated, damaged or of another copy. Fetch the data again."
            )
    return {Path(instruction.filename) for instruction in instructions}


def _image_and_label(directory: Path, info: Any) -> tuple[str, str]:
    """Return the names of the image feature and of the label feature."""
    import tensorflow_datasets as tfds

    features = info.features
    keys = info.supervised_keys
    if keys and len(keys) == 2 and all(isinstance(key, str) for key in keys):
        image, label = keys
        if isinstance(features[image], tfds.features.Image) and isinstance(
            features[label], tfds.features.ClassLabel
        ):
            return image, label
    raise DataError(
        f"{directory}: not an image-classification set: supervised_keys is {keys}, expected an "
        f"Image and a ClassLabel among the features {dict(features)}."
    )


def _decode_tfds(
    directory: Path, splits: tuple[str, str], image_size: int | None, facts: dict[str, Any]
) -> Decoded:
    builder = _builder(directory)
    image, label = _image_and_label(directory, builder.info)
    shape = builder.info.features[image].shape
    classes = tuple(map(str, builder.info.features[label].names))
    decoded = [
        decode_split(
            f"{directory}, split {split!r}",
            _records(builder, split, image, label),
            count=builder.info.splits[split].num_examples,
            channels=1 if shape[-1] == 1 else 3,
            image_size=image_size,
            num_classes=len(classes),
        )
        for split in splits
    ]
    for split, arrays in zip(splits, decoded, strict=True):
        _check_shape(f"{directory}, split {split!r}", arrays, shape, image_size)
    return Decoded(decoded[0], decoded[1], classes, facts)


def _check_shape(
    where: str, split: Split, shape: tuple[int | None, ...], image_size: int | None
) -> None:
    found = split.images.shape[1:]
    expected = tuple(
        have if want is None else want for want, have in zip(shape[:2], found[:2], strict=True)
    )
    if image_size is None and found[:2] != expected:
        raise DataError(f"{where}: images of {found}, but features.json says {shape}.")


def _records(builder: Any, split: str, image: str, label: str) -> Iterator[Encoded]:
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
    for start in range(0, len(source), CHUNK):
        indices = list(range(start, min(start + CHUNK, len(source))))
        try:
            examples = source.__getitems__(indices)
        except (RuntimeError, IndexError) as error:
            raise DataError(
                f"{builder.data_dir}, split {split!r}: damaged among records {start}.."
                f"{indices[-1]} ({error}). Fetch the data again."
            ) from error
        for index, example in zip(indices, examples, strict=True):
            where = f"{builder.data_dir}, split {split!r}, record {index}"
            yield Encoded(where, example[image], int(example[label]))
