"""Tiny data sets in the forms that `pipeline.data` reads, written with TFDS and Pillow."""

import io
import socket

import numpy as np
import pytest
from PIL import Image


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


@pytest.fixture
def random_split():
    """Function that returns random images, and labels that cycle through the classes."""

    def make(seed, count, shape=(6, 5, 3), classes=3):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        return images, np.arange(count) % classes

    return make


@pytest.fixture
def tiny_splits(random_split):
    return {"train": random_split(1, 20), "test": random_split(2, 7)}


@pytest.fixture
def prepare_tfds(tmp_path):
    """Function that writes splits as a TFDS copy and returns (root, directory of the version)."""
    import tensorflow_datasets as tfds

    def prepare(
        splits,
        *,
        name="tiny_shapes",
        version="1.0.0",
        shape=(6, 5, 3),
        classes=("ant", "bee", "cow"),
        root=None,
        supervised_keys=("image", "label"),
    ):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(names=classes),
            }
        )

        class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version(version)

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="Random pixels.\nTwo lines.",
                    features=features,
                    supervised_keys=supervised_keys,
                )

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(*split) for name, split in splits.items()}

            def _generate_examples(self, images, labels):
                for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield index, {"image": png(image), "label": int(label)}

        Tiny.name = name
        root = root or tmp_path / "tfds"
        builder = Tiny(data_dir=str(root), file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
        return root, root / name / version

    return prepare


@pytest.fixture
def no_network(monkeypatch):
    """Make any attempt to open a connection or look up a name fail the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("went online")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def write_folder(tmp_path):
    """Function that writes {'train/ant': images, ...} as PNG files below a folder."""

    def write(classes, name="folder"):
        for path, images in classes.items():
            directory = tmp_path / name / path
            directory.mkdir(parents=True)
            for index, image in enumerate(images):
                (directory / f"{index:03d}.png").write_bytes(png(image).getvalue())
        return tmp_path / name

    return write


@pytest.fixture
def sorted_rows():
    """Function that sorts images with their labels, to compare them as sets."""

    def sort(images, labels):
        rows = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
        return rows[np.lexsort(rows.T)]

    return sort
