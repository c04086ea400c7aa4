"""The cache of decoded data: verified, replaced when damaged, never confused with another."""

import json
import logging
import os
import shutil

import numpy as np
import pytest

from jaxqat.pipeline.data import DataConfig, DataError, load_dataset


@pytest.fixture
def config(prepare_tfds, tiny_splits, tmp_path):
    root, _ = prepare_tfds(tiny_splits)
    return DataConfig(
        name="tiny_shapes", data_dir=str(root), cache_dir=str(tmp_path / "cache"), validation_size=5
    )


def entry(tmp_path):
    (path,) = (tmp_path / "cache").glob("*.npz")
    return path


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same(one, other):
    assert one.fingerprint == other.fingerprint
    assert one.class_names == other.class_names
    assert (one.mean, one.std) == (other.mean, other.std)
    for name in ("train", "validation", "test"):
        a, b = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert (a.images.dtype, a.labels.dtype) == (b.images.dtype, b.labels.dtype)


def test_a_verified_cache_needs_neither_source_nor_network(config, tmp_path, no_network):
    first = load_dataset(config)
    shutil.rmtree(config.data_dir)

    assert_same(load_dataset(config), first)


def test_a_verified_cache_is_not_decoded_again(config, monkeypatch):
    first = load_dataset(config)

    def refuse(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr("jaxqat.pipeline.data.arrays.decode_image", refuse)

    assert_same(load_dataset(config), first)


def test_a_flipped_bit_is_logged_and_the_data_decoded_again(config, tmp_path, caplog):
    first = load_dataset(config)
    good = entry(tmp_path).read_bytes()
    damage(entry(tmp_path))

    with caplog.at_level(logging.WARNING):
        second = load_dataset(config)

    assert f"{entry(tmp_path)}: the cache is damaged" in caplog.text
    assert_same(second, first)
    assert entry(tmp_path).read_bytes() == good


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"], ids=["missing", "empty", "binary"])
def test_a_cache_without_a_readable_checksum_is_not_trusted(config, tmp_path, caplog, content):
    first = load_dataset(config)
    checksum = entry(tmp_path).with_name(entry(tmp_path).name + ".sha256")
    checksum.unlink()
    if content is not None:
        checksum.write_bytes(content)

    assert_same(load_dataset(config), first)
    assert f"{checksum}: the cache's checksum cannot be read" in caplog.text


def test_a_damaged_cache_without_a_source_is_an_error(config, tmp_path):
    load_dataset(config)
    shutil.rmtree(config.data_dir)
    damage(entry(tmp_path))

    with pytest.raises(DataError, match=r"no prepared copy.*the cache is damaged"):
        load_dataset(config)


def test_a_changed_source_does_not_use_the_cache_of_the_old_one(
    config, tmp_path, prepare_tfds, random_split
):
    first = load_dataset(config)
    shutil.rmtree(config.data_dir)
    prepare_tfds({"train": random_split(7, 20), "test": random_split(8, 7)})

    second = load_dataset(config)

    assert not np.array_equal(first.test.images, second.test.images)
    assert first.fingerprint["source_sha256"] != second.fingerprint["source_sha256"]
    assert first.fingerprint["sha256"]["train"] != second.fingerprint["sha256"]["train"]


def test_two_copies_in_the_cache_and_no_source_is_an_error_that_names_them(
    config, tmp_path, prepare_tfds, random_split
):
    load_dataset(config)
    shutil.rmtree(config.data_dir)
    prepare_tfds({"train": random_split(7, 20), "test": random_split(8, 7)})
    load_dataset(config)
    shutil.rmtree(config.data_dir)

    with pytest.raises(DataError, match="2 different copies of 'tiny_shapes'") as error:
        load_dataset(config)

    for path in (tmp_path / "cache").glob("*.npz"):
        assert str(path) in str(error.value)


def test_a_changed_description_is_another_copy(config, tmp_path):
    first = load_dataset(config)
    path = next((tmp_path / "tfds").glob("tiny_shapes/*/dataset_info.json"))
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"description": "The same images, said to be JPEG."}))

    second = load_dataset(config)

    assert second.fingerprint["description"] == "The same images, said to be JPEG."
    assert second.fingerprint["sha256"] == first.fingerprint["sha256"]


def test_a_copy_with_other_modification_times_is_the_same_data(config, tmp_path):
    load_dataset(config)
    for path in (tmp_path / "tfds").rglob("*"):
        os.utime(path, (1, 1))

    load_dataset(config)

    assert entry(tmp_path)  # Still one.


def test_a_process_stopped_while_writing_leaves_no_entry(config, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            load_dataset(config)

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_only_logs_a_warning(config, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")

    data = load_dataset(config)

    assert len(data.train) == 15
    assert "cannot cache decoded data" in caplog.text
