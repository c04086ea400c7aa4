"""TFDS copies: decoded exactly, read offline, with a clear error if damaged."""

import json
import sys
import time
from typing import Any

import numpy as np
import pytest

from jaxqat.pipeline.data import DataConfig, DataError, load_dataset


def config(root, tmp_path, **changes):
    values: dict[str, Any] = {
        "name": "tiny_shapes",
        "data_dir": str(root),
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**(values | changes))


def shard(directory, split="train"):
    return directory / f"tiny_shapes-{split}.array_record-00000-of-00001"


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_decoded_images_and_labels_are_those_that_were_written(
    prepare_tfds, tiny_splits, tmp_path, no_network, sorted_rows
):
    root, _ = prepare_tfds(tiny_splits)

    data = load_dataset(config(root, tmp_path))

    for name, split in (("train", data.train), ("test", data.test)):
        images, labels = tiny_splits[name]
        # TFDS shuffles examples, so they are compared as sets.
        np.testing.assert_array_equal(
            sorted_rows(split.images, split.labels), sorted_rows(images, labels)
        )
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    assert data.class_names == ("ant", "bee", "cow")
    assert data.image_shape == (6, 5, 3)
    assert data.validation is None
    assert "tensorflow" not in sys.modules


def test_the_fingerprint_identifies_the_copy(prepare_tfds, tiny_splits, tmp_path):
    root, _ = prepare_tfds(tiny_splits)

    fingerprint = load_dataset(config(root, tmp_path)).fingerprint

    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["description"] == "Random pixels. Two lines."
    assert fingerprint["version"] == "1.0.0"
    assert fingerprint["counts"] == {"train": 20, "test": 7}
    assert fingerprint["image_shape"] == [6, 5, 3]


def test_grey_images_keep_one_channel(prepare_tfds, tmp_path, random_split, sorted_rows):
    splits = {"train": random_split(1, 9, (4, 4, 1)), "test": random_split(2, 3, (4, 4, 1))}
    root, _ = prepare_tfds(splits, shape=(4, 4, 1))

    data = load_dataset(config(root, tmp_path))

    np.testing.assert_array_equal(
        sorted_rows(data.train.images, data.train.labels), sorted_rows(*splits["train"])
    )


def test_slices_of_a_split_serve_as_splits(prepare_tfds, tmp_path, random_split, sorted_rows):
    images, labels = random_split(1, 20)
    root, _ = prepare_tfds({"train": (images, labels)})

    data = load_dataset(config(root, tmp_path, train_split="train[:80%]", test_split="train[80%:]"))

    assert (len(data.train), len(data.test)) == (16, 4)
    both = (
        np.concatenate([data.train.images, data.test.images]),
        np.concatenate([data.train.labels, data.test.labels]),
    )
    np.testing.assert_array_equal(sorted_rows(*both), sorted_rows(images, labels))


def test_the_newest_version_is_read_unless_one_is_named(prepare_tfds, tiny_splits, tmp_path):
    for version in ("9.0.0", "10.0.0"):  # As text, "9" comes last.
        root, _ = prepare_tfds(tiny_splits, version=version)

    newest = load_dataset(config(root, tmp_path))
    named = load_dataset(config(root, tmp_path, name="tiny_shapes:9.0.0"))

    assert newest.fingerprint["version"] == "10.0.0"
    assert named.fingerprint["version"] == "9.0.0"


def test_missing_data_is_an_error_that_says_what_to_do(tmp_path, no_network):
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        load_dataset(config(tmp_path / "nowhere", tmp_path, name="cifar10"))

    assert time.monotonic() - start < 10
    for part in (str(tmp_path / "nowhere" / "cifar10"), str(tmp_path / "cache"), "data.data_dir",
                 "TFDS_DATA_DIR", "data.download"):  # fmt: skip
        assert part in str(error.value)


def test_the_root_comes_from_the_environment_if_the_config_names_none(
    prepare_tfds, tiny_splits, tmp_path, monkeypatch
):
    root, _ = prepare_tfds(tiny_splits)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    monkeypatch.setenv("JAXQAT_CACHE_DIR", str(tmp_path / "other_cache"))

    data = load_dataset(DataConfig(name="tiny_shapes"))

    assert len(data.train) == 20
    assert list((tmp_path / "other_cache").glob("tiny_shapes-*.npz"))


def truncate(directory):
    path = shard(directory)
    path.write_bytes(path.read_bytes()[:-50_000])
    return f"{path}: 0 records in {path.stat().st_size} bytes"


def empty(directory):
    shard(directory).write_bytes(b"")
    return shard(directory)


def delete(directory):
    shard(directory, "test").unlink()
    return f"{shard(directory, 'test')}: missing; split 'test' needs it"


def swap_train_for_test(directory):
    shard(directory).write_bytes(shard(directory, "test").read_bytes())
    return f"{shard(directory)}: 7 records"


def flip_a_bit_of_the_records(directory):
    content = bytearray(shard(directory).read_bytes())
    content[200] ^= 1  # After the file's header, in the first chunk's images.
    shard(directory).write_bytes(content)
    return "split 'train'"


def break_metadata(directory):
    (directory / "dataset_info.json").write_text("{")
    return directory


def change_format(directory):
    edit_json(directory / "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    return "prepared as tfrecord, expected array_record"


def shrink_images_in_metadata(directory):
    def change(features):
        image = features["featuresDict"]["features"]["image"]["image"]
        image["shape"]["dimensions"] = ["4", "4", "3"]

    edit_json(directory / "features.json", change)
    return "images of (6, 5, 3), but features.json says (4, 4, 3)"


def drop_a_class(directory):
    def change(features):
        features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "2"

    edit_json(directory / "features.json", change)
    (directory / "label.labels.txt").write_text("ant\nbee\n")
    return "label 2, expected 0..1"


def forget_the_test_split(directory):
    edit_json(directory / "dataset_info.json", lambda info: info["splits"].pop())
    return "no split"


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        delete,
        swap_train_for_test,
        flip_a_bit_of_the_records,
        break_metadata,
        change_format,
        shrink_images_in_metadata,
        drop_a_class,
        forget_the_test_split,
    ],
)
def test_a_damaged_copy_is_named_and_leaves_no_cache(damage, prepare_tfds, tiny_splits, tmp_path):
    root, directory = prepare_tfds(tiny_splits)
    expected = str(damage(directory))

    with pytest.raises(DataError) as error:
        load_dataset(config(root, tmp_path))

    assert expected in str(error.value)
    assert str(directory) in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


def test_images_of_different_sizes_are_an_error_unless_resized(
    prepare_tfds, tmp_path, random_split
):
    small, large = random_split(1, 5, (6, 6, 3)), random_split(2, 5, (8, 10, 3))
    images = [*small[0], *large[0]]
    labels = np.concatenate([small[1], large[1]])
    root, _ = prepare_tfds(
        {"train": (images, labels), "test": random_split(3, 4, (6, 6, 3))}, shape=(None, None, 3)
    )

    with pytest.raises(DataError, match=r"All must have one size: set data.image_size"):
        load_dataset(config(root, tmp_path))
    data = load_dataset(config(root, tmp_path, image_size=6))

    assert data.image_shape == (6, 6, 3)
    # Images that already have the size are unchanged.
    rows = {image.tobytes() for image in data.train.images}
    assert {image.tobytes() for image in small[0]} <= rows


def test_train_and_test_images_of_different_sizes_are_an_error(
    prepare_tfds, tmp_path, random_split
):
    splits = {"train": random_split(1, 5, (6, 6, 3)), "test": random_split(2, 5, (8, 8, 3))}
    root, _ = prepare_tfds(splits, shape=(None, None, 3))

    with pytest.raises(DataError, match=r"both must have one size: set data.image_size"):
        load_dataset(config(root, tmp_path))


def test_a_set_without_image_and_class_is_an_error(prepare_tfds, tiny_splits, tmp_path):
    root, _ = prepare_tfds(tiny_splits, supervised_keys=("label", "image"))

    with pytest.raises(DataError, match="not an image-classification set"):
        load_dataset(config(root, tmp_path))


def test_a_configuration_must_be_named_if_there_are_several(prepare_tfds, tiny_splits, tmp_path):
    root, directory = prepare_tfds(tiny_splits)
    target = root / "tiny_shapes" / "large" / "1.0.0"
    target.parent.mkdir()
    directory.rename(target)

    with pytest.raises(DataError, match="choose one, as in 'tiny_shapes/large'"):
        load_dataset(config(root, tmp_path))
    data = load_dataset(config(root, tmp_path, name="tiny_shapes/large"))

    assert len(data.train) == 20
