"""Image files that no camera wrote: each is one error that names the file."""

import os
import struct
import zlib

import numpy as np
import pytest

from jaxqat.pipeline.data import DataConfig, DataError, load_dataset
from jaxqat.pipeline.data.sources import MAX_FILE_BYTES, locate_folder

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    """Return a grey PNG of this declared size, with little data behind it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return SIGNATURE + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


@pytest.fixture
def folder(write_folder, random_split):
    """Two classes of three good images each, one of them to be replaced."""
    good = random_split(0, 3, (4, 4, 3))[0]
    return write_folder({"ant": good, "cat": good})


def load(root, tmp_path):
    return load_dataset(
        DataConfig(name="folder", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    )


@pytest.mark.parametrize(
    "content",
    [
        png(50_000, 50_000),
        png(10_000, 10_000),
        png(4, 4, chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2**26)))),
        png(4, 4)[:20],
        SIGNATURE + chunk(b"IHDR", b"\0\0\0\4"),
        SIGNATURE + struct.pack(">I", 2**31 - 1) + b"IHDR",
        b"BM" + b"\xff" * 40,
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"",
    ],
    ids=["huge", "large", "text", "cut", "header", "length", "bmp", "webp", "empty"],
)
def test_a_file_that_is_no_image_to_train_on_is_named(folder, tmp_path, content):
    path = sorted((folder / "ant").iterdir())[0]
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(folder, tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_too_large_for_an_image_is_not_read(folder, tmp_path):
    path = sorted((folder / "cat").iterdir())[0]
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(DataError, match=f"{path}: .* more than"):
        load(folder, tmp_path)


def test_the_name_of_a_class_must_be_text(folder, tmp_path):
    (folder / "cat").rename(os.fsdecode(os.fsencode(folder) + b"/c\xff"))
    with pytest.raises(DataError, match=r"c\\xff': the name of a class must be UTF-8"):
        load(folder, tmp_path)


def test_the_name_of_a_file_may_be_any_bytes(folder, tmp_path):
    path = sorted((folder / "cat").iterdir())[0]
    path.rename(os.fsdecode(os.fsencode(folder) + b"/cat/\xff.png"))
    data = load(folder, tmp_path)
    np.testing.assert_array_equal(np.bincount(data.train.labels), [2, 2])


def test_a_class_of_one_image_says_what_is_needed(folder):
    for path in sorted((folder / "cat").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"cat: 1 image. A class needs 2 or more, one to train"):
        locate_folder(folder, train_split="train", test_split="test", image_size=None)
