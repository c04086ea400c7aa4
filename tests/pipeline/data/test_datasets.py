"""Digits, validation splits, limits, statistics, fingerprints and checks of the config."""

import json
from typing import Any

import numpy as np
import pytest
import sklearn.datasets

from jaxqat.pipeline.data import DataConfig, DataError, load_dataset
from jaxqat.pipeline.data.datasets import channel_statistics


def keys(split):
    return [image.tobytes() + bytes([label]) for image, label in zip(
        split.images, split.labels.tolist(), strict=True)]  # fmt: skip


def test_digits_are_scikit_learns_scaled_to_255_each_in_one_split():
    data = load_dataset(DataConfig())

    bunch: Any = sklearn.datasets.load_digits()
    # v * 255 / 16 in integers: floor((510 v + 16) / 32) rounds to nearest, and no v gives a tie
    # except v = 8 (127.5), which rint rounds to even: 128, the same.
    values = bunch.images.astype(np.int64)
    scaled = ((510 * values + 16) // 32).astype(np.uint8)
    expected = sorted(
        image.tobytes() + bytes([label])
        for image, label in zip(scaled, bunch.target.tolist(), strict=True)
    )
    assert sorted(keys(data.train) + keys(data.test)) == expected
    assert data.image_shape == (8, 8, 1)
    assert (data.train.images.min(), data.train.images.max()) == (0, 255)
    assert data.class_names == tuple("0123456789")


def test_digits_give_a_fifth_of_every_class_to_the_test_split():
    data = load_dataset(DataConfig())

    test, train = np.bincount(data.test.labels), np.bincount(data.train.labels)
    np.testing.assert_array_equal(test, np.rint(0.2 * (test + train)))


def test_digits_need_no_network_and_no_cache(no_network, tmp_path):
    load_dataset(DataConfig(cache_dir=str(tmp_path / "cache")))

    assert not (tmp_path / "cache").exists()


def test_digits_can_be_resized():
    data = load_dataset(DataConfig(image_size=12))

    assert data.image_shape == (12, 12, 1)
    assert data.fingerprint["image_shape"] == [12, 12, 1]


def test_validation_images_are_taken_from_training_and_the_rest_stays_in_order():
    whole = load_dataset(DataConfig())
    carved = load_dataset(DataConfig(validation_size=300))

    assert carved.validation is not None
    assert (len(carved.train), len(carved.validation)) == (len(whole.train) - 300, 300)
    assert sorted(keys(carved.train) + keys(carved.validation)) == sorted(keys(whole.train))
    assert keys(carved.test) == keys(whole.test)
    positions = {key: index for index, key in enumerate(keys(whole.train))}
    kept = [positions[key] for key in keys(carved.train)]
    assert kept == sorted(kept)


def test_the_validation_split_depends_only_on_its_seed():
    first, again, other = (
        load_dataset(DataConfig(validation_size=50, validation_seed=seed)).fingerprint
        for seed in (1, 1, 2)
    )

    assert first == again
    assert first["sha256"]["validation"] != other["sha256"]["validation"]


def test_limits_keep_the_validation_split_and_are_in_the_fingerprint():
    whole = load_dataset(DataConfig(validation_size=50))
    limited = load_dataset(DataConfig(validation_size=50, train_limit=40, test_limit=30))

    assert limited.fingerprint["counts"] == {"train": 40, "validation": 50, "test": 30}
    assert limited.fingerprint["sha256"]["validation"] == whole.fingerprint["sha256"]["validation"]
    assert set(keys(limited.train)) <= set(keys(whole.train))
    # Digits are not sorted by class; in a sorted folder, a limit to the first images would miss
    # classes.
    assert len(np.unique(limited.train.labels)) == 10


def test_statistics_are_those_of_the_pixels_in_float64():
    images = np.random.default_rng(0).integers(0, 256, (2500, 4, 4, 3), dtype=np.uint8)
    images[..., 1] //= 3

    mean, std = channel_statistics(images)

    # NumPy's pairwise float64 sums over 40,000 values: far below 1e-12 relative.
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


def test_statistics_are_of_the_training_images_without_validation():
    data = load_dataset(DataConfig(validation_size=700))

    assert data.mean == channel_statistics(data.train.images)[0]
    assert data.mean != load_dataset(DataConfig()).mean


def test_the_fingerprint_is_json_and_contains_the_counts():
    fingerprint = load_dataset(DataConfig(validation_size=38)).fingerprint

    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["counts"] == {"train": 1400, "validation": 38, "test": 359}
    assert fingerprint["num_classes"] == 10


def test_one_changed_pixel_changes_the_fingerprint(write_folder, random_split, tmp_path):
    images = random_split(0, 10)[0]
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1

    first, second = (
        load_dataset(
            DataConfig(
                name="folder",
                data_dir=str(write_folder({"ant": cut, "cat": images}, name)),
                cache_dir=str(tmp_path / "cache"),
            )
        ).fingerprint
        for name, cut in (("one", images), ("two", changed))
    )

    assert first["sha256"] != second["sha256"]
    assert first["source_sha256"] != second["source_sha256"]


def test_images_of_one_value_are_an_error(write_folder, tmp_path):
    black = np.zeros((5, 4, 4, 3), np.uint8)
    root = write_folder({"ant": black, "cat": black})

    with pytest.raises(DataError, match="one value in all training images"):
        load_dataset(
            DataConfig(name="folder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
        )


def test_a_validation_split_of_all_training_images_is_an_error():
    with pytest.raises(DataError, match=r"data.validation_size must be in 0..1437.*got 1438"):
        load_dataset(DataConfig(validation_size=1438))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "no such/set/x"}, r"data.name must be .*got 'no such/set/x'"),
        ({"name": ""}, "data.name must be"),
        ({"name": "folder"}, "data.data_dir must be the folder of images"),
        ({"validation_size": -1}, "data.validation_size must be >= 0, got -1"),
        ({"validation_seed": -1}, r"data.validation_seed must be in 0..2\*\*32 - 1, got -1"),
        ({"image_size": 0}, "data.image_size must be 1 or more, or null, got 0"),
        ({"train_limit": 0}, "data.train_limit must be 1 or more, or null, got 0"),
        ({"test_limit": -5}, "data.test_limit must be 1 or more, or null, got -5"),
    ],
)
def test_an_invalid_value_is_named_by_its_dotted_key(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)
