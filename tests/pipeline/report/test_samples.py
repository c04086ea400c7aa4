import numpy as np
import pytest

from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.samples import read_samples, write_samples


def test_samples_are_read_as_written(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 1), np.uint8)
    write_samples(tmp_path, images, np.array([1, 0, 1]), ["ä", "b$"])
    samples = read_samples(tmp_path)

    assert samples is not None
    np.testing.assert_array_equal(samples.images, images)
    assert samples.labels.tolist() == [1, 0, 1]
    assert samples.class_names == ("ä", "b$")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, int)),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2)),
    ],
    ids=["float", "no_channels", "too_many_labels", "float_labels"],
)
def test_samples_of_wrong_type_or_shape_are_an_error(tmp_path, images, labels):
    with pytest.raises(ValueError, match=r"samples must be uint8\[m, h, w, c\]"):
        write_samples(tmp_path, images, labels, ["a"])

    assert not list(tmp_path.iterdir())


def test_samples_with_a_label_without_name_are_an_error(tmp_path):
    write_samples(tmp_path, np.zeros((1, 2, 2, 3), np.uint8), np.array([2]), ["a", "b"])

    with pytest.raises(ReportError, match=r"report_data\.npz is broken: labels must be in 0\.\.1"):
        read_samples(tmp_path)
