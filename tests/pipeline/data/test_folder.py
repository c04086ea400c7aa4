"""Folders of images by class."""

import io
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from jaxqat.pipeline.data import DataConfig, DataError, load_dataset
from jaxqat.pipeline.data.arrays import Encoded, decode_image


def config(root, tmp_path, **changes):
    values: dict[str, Any] = {
        "name": "folder",
        "data_dir": str(root),
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**(values | changes))


@pytest.fixture
def images(random_split):
    return lambda seed, count, shape=(5, 4, 3): random_split(seed, count, shape)[0]


@pytest.fixture
def two_splits(write_folder, images):
    content = {
        "train/cat": images(1, 6),
        "train/ant": images(2, 4),
        "test/cat": images(3, 2),
        "test/ant": images(4, 3),
    }
    return write_folder(content), content


def test_images_are_read_by_split_and_class_in_the_order_of_their_names(two_splits, tmp_path):
    root, content = two_splits

    data = load_dataset(config(root, tmp_path))

    assert data.class_names == ("ant", "cat")
    for name, split in (("train", data.train), ("test", data.test)):
        ants, cats = content[f"{name}/ant"], content[f"{name}/cat"]
        np.testing.assert_array_equal(split.images, np.concatenate([ants, cats]))
        np.testing.assert_array_equal(split.labels, [0] * len(ants) + [1] * len(cats))


def test_without_split_folders_a_fifth_of_each_class_is_the_test_split(
    write_folder, images, tmp_path, sorted_rows
):
    ants, cats = images(1, 20), images(2, 10)
    root = write_folder({"ant": ants, "cat": cats})

    data = load_dataset(config(root, tmp_path))

    np.testing.assert_array_equal(np.bincount(data.test.labels), [4, 2])
    np.testing.assert_array_equal(np.bincount(data.train.labels), [16, 8])
    both = np.concatenate([data.train.images, data.test.images])
    labels = np.concatenate([data.train.labels, data.test.labels])
    np.testing.assert_array_equal(
        sorted_rows(both, labels),
        sorted_rows(np.concatenate([ants, cats]), np.array([0] * 20 + [1] * 10)),
    )


def test_a_folder_of_grey_images_has_one_channel(write_folder, images, tmp_path):
    grey = {name: images(seed, 5, (4, 4, 1)) for seed, name in enumerate(("ant", "cat"))}

    data = load_dataset(config(write_folder(grey), tmp_path))

    assert data.image_shape == (4, 4, 1)
    assert {image.tobytes() for image in data.test.images} <= {
        image.tobytes() for group in grey.values() for image in group
    }


def test_a_grey_image_among_coloured_ones_becomes_coloured(write_folder, images, tmp_path):
    root = write_folder({"ant": images(1, 5), "cat": images(2, 5, (5, 4, 1))})

    data = load_dataset(config(root, tmp_path))

    assert data.image_shape == (5, 4, 3)
    cats = data.train.images[data.train.labels == 1]
    np.testing.assert_array_equal(cats, np.repeat(cats[..., :1], 3, axis=-1))


def test_an_image_is_turned_as_its_exif_orientation_says(random_split):
    pixels = random_split(0, 1, (4, 6, 3))[0][0]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # The camera was turned to the left: show it turned right.
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", exif=exif)
    found = decode_image(Encoded("photo.png", buffer.getvalue(), 0), channels=3, image_size=None)
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))


def test_what_is_transparent_becomes_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 128]]
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, format="png")
    found = decode_image(Encoded("logo.png", buffer.getvalue(), 0), channels=3, image_size=None)
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    assert np.abs(found - expected).max() <= 1  # Pillow rounds each product.


def test_the_cache_replaces_a_missing_folder(two_splits, tmp_path):
    root, _ = two_splits
    first = load_dataset(config(root, tmp_path))
    shutil.rmtree(root)

    assert load_dataset(config(root, tmp_path)).fingerprint == first.fingerprint


def test_a_missing_folder_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(
        DataError, match=r"data.data_dir: no folder .*one folder of images per class"
    ):
        load_dataset(config(tmp_path / "nowhere", tmp_path))


def truncate(root):
    path = root / "train/cat/003.png"
    path.write_bytes(path.read_bytes()[:60])
    return f"{path}: cannot be decoded"


def not_an_image(root):
    (root / "test/cat/001.png").write_bytes(b"hello")
    return f"{root}/test/cat/001.png: cannot be decoded"


def another_size(root):
    Image.new("RGB", (9, 9)).save(root / "train/cat/003.png")
    return f"{root}/train/cat/003.png: 9x9x3 image, but the first one of {root}/train is 5x4x3"


def sixteen_bits(root):
    Image.new("I;16", (4, 5)).save(root / "train/ant/000.png")
    return f"{root}/train/ant/000.png: pixels of mode I;16; convert them to 8 bits"


def empty_class(root):
    shutil.rmtree(root / "test/cat")
    (root / "test/cat").mkdir()
    return f"{root}/test/cat: a class without images"


def unknown_class(root):
    shutil.copytree(root / "test/cat", root / "test/dog")
    return f"{root}/test: classes differ from those of {root}/train: ['dog']"


def no_test_split(root):
    shutil.rmtree(root / "test")
    return f"{root}: has 'train', but needs both 'train' and 'test'"


def one_class(root):
    shutil.rmtree(root / "train/cat")
    shutil.rmtree(root / "test/cat")
    return f"{root}/train: 1 class folders with images, expected 2 or more"


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        not_an_image,
        another_size,
        sixteen_bits,
        empty_class,
        unknown_class,
        no_test_split,
        one_class,
    ],
)
def test_a_damaged_folder_is_named_and_leaves_no_cache(damage, two_splits, tmp_path):
    root, _ = two_splits
    expected = damage(root)

    with pytest.raises(DataError) as error:
        load_dataset(config(root, tmp_path))

    assert expected in str(error.value)
    assert not list(tmp_path.glob("cache/*"))


def test_files_that_are_not_images_are_ignored_and_counted(two_splits, tmp_path, caplog):
    root, _ = two_splits
    (root / "train/cat/notes.txt").write_text("hello")

    data = load_dataset(config(root, tmp_path))

    assert len(data.train) == 10
    assert f"{root}/train: ignored 1 files that are not images" in caplog.text
