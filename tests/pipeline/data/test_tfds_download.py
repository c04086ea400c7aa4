"""Downloads: only on request, never hanging, and CIFAR prepared without TensorFlow."""

import io
import sys
import tarfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxqat.pipeline.data import DataConfig, DataError, load_dataset, tfds_download


def cifar_archive(path, files):
    """Write {name: bytes} as an archive like the University of Toronto's."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def records(seed, count, label_bytes, classes):
    rows = np.random.default_rng(seed).integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
    rows[:, :label_bytes] %= classes
    return rows


@pytest.fixture
def offer(monkeypatch):
    """Function that makes TFDS's download manager return a local file, without network access."""

    def offer(path):
        asked = []

        def fetch(self, url):
            asked.append(url)
            return path

        monkeypatch.setattr(tfds.download.DownloadManager, "download", fetch)
        monkeypatch.setattr(tfds_download, "check_reachable", lambda name, url: asked.append(url))
        return asked

    return offer


def test_cifar10_is_prepared_from_its_archive_without_tensorflow(tmp_path, offer, sorted_rows):
    train = [records(seed, 6, 1, 10) for seed in range(5)]
    test = records(9, 4, 1, 10)
    names = [f"class{i}" for i in range(10)]
    prefix = "cifar-10-batches-bin/"
    files = {f"{prefix}data_batch_{i + 1}.bin": rows.tobytes() for i, rows in enumerate(train)}
    files[f"{prefix}test_batch.bin"] = test.tobytes()
    files[f"{prefix}batches.meta.txt"] = ("\n".join(names) + "\n\n").encode()
    asked = offer(cifar_archive(tmp_path / "cifar.tar.gz", files))

    data = load_dataset(
        DataConfig(
            name="cifar10",
            data_dir=str(tmp_path / "tfds"),
            cache_dir=str(tmp_path / "cache"),
            download=True,
        )
    )

    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"] * 2
    assert data.class_names == tuple(names)
    for split, rows in ((data.train, np.concatenate(train)), (data.test, test)):
        # Channels lie one after another in a record.
        images = np.stack([rows[:, 1 + 1024 * c : 1 + 1024 * (c + 1)] for c in range(3)], axis=-1)
        np.testing.assert_array_equal(
            sorted_rows(split.images, split.labels), sorted_rows(images, rows[:, 0])
        )
    assert "tensorflow" not in sys.modules


def test_cifar100_uses_the_fine_label(tmp_path, offer):
    # The second byte of a record is the label; the first is the coarse one of 20.
    rows = records(0, 30, 2, 20)
    rows[:, 1] = np.arange(70, 100)
    prefix = "cifar-100-binary/"
    files = {
        f"{prefix}train.bin": rows[:20].tobytes(),
        f"{prefix}test.bin": rows[20:].tobytes(),
        f"{prefix}coarse_label_names.txt": "\n".join(f"c{i}" for i in range(20)).encode(),
        f"{prefix}fine_label_names.txt": "\n".join(f"f{i}" for i in range(100)).encode(),
    }
    offer(cifar_archive(tmp_path / "cifar.tar.gz", files))

    data = load_dataset(
        DataConfig(
            name="cifar100",
            data_dir=str(tmp_path / "tfds"),
            cache_dir=str(tmp_path / "cache"),
            download=True,
        )
    )

    assert sorted(data.train.labels) == list(range(70, 90))
    assert data.class_names[70] == "f70"


def test_the_archives_checksum_is_tfdss_own():
    for name in ("cifar10", "cifar100"):
        parent = {"cifar10": tfds.image_classification.Cifar10,
                  "cifar100": tfds.image_classification.Cifar100}[name]  # fmt: skip
        infos = tfds_download.cifar_builder(name).url_infos
        assert infos == parent.url_infos
        assert all(len(info.checksum) == 64 for info in infos.values())


def test_nothing_is_downloaded_without_request(tmp_path, monkeypatch, no_network):
    def refuse(*args):
        raise AssertionError("downloaded")

    monkeypatch.setattr(tfds_download, "download", refuse)

    with pytest.raises(DataError, match=r"data.download to true"):
        load_dataset(
            DataConfig(name="cifar10", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
        )


@pytest.mark.parametrize("behaviour", ["refuses", "hangs"])
def test_a_network_that_refuses_or_hangs_is_an_error_within_ten_seconds(
    behaviour, tmp_path, monkeypatch
):
    def open_url(*args, **kwargs):
        if behaviour == "hangs":
            time.sleep(30)
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", open_url)
    monkeypatch.setattr(tfds_download, "REACHABLE_SECONDS", 0.5)  # 8 in use.

    start = time.monotonic()
    with pytest.raises(DataError, match=r"cannot download from https://www.cs.toronto.edu"):
        tfds_download.download("cifar10", tmp_path)

    assert time.monotonic() - start < 2


def test_an_unknown_name_is_an_error_without_a_network(tmp_path, no_network):
    with pytest.raises(DataError, match="'no_such_set': TFDS cannot build it"):
        tfds_download.download("no_such_set", tmp_path)


def test_a_damaged_archive_is_an_error_and_leaves_no_prepared_copy(tmp_path, offer):
    (tmp_path / "cifar.tar.gz").write_bytes(b"not an archive")
    offer(tmp_path / "cifar.tar.gz")

    with pytest.raises(DataError, match="could not download and prepare it"):
        tfds_download.download("cifar10", tmp_path / "tfds")

    assert not list((tmp_path / "tfds").glob("cifar10/3*"))
