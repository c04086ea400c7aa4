import numpy as np
import pytest

from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.samples import (
    MAX_PER_GALLERY,
    MAX_SAMPLES,
    SAMPLES_FILE,
    choose_samples,
    read_samples,
    write_samples,
)

NAMES = ("ä", "b$", "c")
LABELS = np.array([0, 0, 0, 1, 2, 1])
# The float network is right. The integer network changes images 1 and 4, and is surer of 4.
REAL = np.eye(3)[LABELS] * 2.0
INTEGER = REAL.copy()
INTEGER[1], INTEGER[4] = [0, 1, 0], [5, 0, 0]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 1), np.uint8)


def choose(labels=LABELS, images=IMAGES, logits=(REAL, INTEGER), names=NAMES):
    return choose_samples(
        images, labels, names, dict(zip(("FP32", "integer"), logits, strict=True))
    )


def test_samples_are_read_as_written(tmp_path):
    samples = choose()
    write_samples(tmp_path, samples)
    found = read_samples(tmp_path)

    assert found is not None
    assert (found.class_names, found.networks) == (NAMES, ("FP32", "integer"))
    for name in ("images", "labels", "predicted", "probabilities", "samples", "changed", "errors"):
        np.testing.assert_array_equal(getattr(found, name), getattr(samples, name))
    assert found.totals.tolist() == [6, 2, 2]


def test_samples_take_turns_among_the_classes():
    samples = choose()

    assert samples.labels[samples.samples].tolist() == [0, 1, 2, 0, 1, 0]
    np.testing.assert_array_equal(samples.images[samples.samples], IMAGES[[0, 3, 4, 1, 5, 2]])


def test_changed_classes_and_errors_begin_with_the_surest():
    samples = choose()

    for group in (samples.changed, samples.errors):
        np.testing.assert_array_equal(samples.images[group], IMAGES[[4, 1]])
    # exp(5) / (exp(5) + 2) and e / (e + 2).
    np.testing.assert_allclose(
        samples.probabilities[1, samples.errors],
        [np.exp(5) / (np.exp(5) + 2), np.e / (np.e + 2)],
        rtol=1e-6,  # A float32 has 24 bits.
    )
    assert samples.predicted[:, samples.changed].tolist() == [[2, 0], [0, 1]]


def test_an_error_of_both_networks_is_no_changed_class():
    wrong = np.eye(3)[(LABELS + 1) % 3]
    samples = choose(logits=(wrong, wrong))

    assert (len(samples.changed), len(samples.errors)) == (0, 6)
    assert samples.totals.tolist() == [6, 0, 6]


def test_few_images_of_a_large_split_are_kept():
    labels = np.arange(1000) % 3
    images = np.zeros((1000, 2, 2, 3), np.uint8)
    samples = choose(labels, images, (np.eye(3)[labels], np.eye(3)[(labels + 1) % 3]))

    assert len(samples.samples) == MAX_SAMPLES
    assert len(samples.changed) == len(samples.errors) == MAX_PER_GALLERY
    assert len(samples.images) <= MAX_SAMPLES + 2 * MAX_PER_GALLERY
    assert samples.totals.tolist() == [1000, 1000, 1000]


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
def test_samples_of_wrong_type_or_shape_are_an_error(images, labels):
    with pytest.raises(ValueError, match=r"samples must be uint8\[m, h, w, c\]"):
        choose(labels, images)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("labels", np.array([3] * 6), r"labels must be in 0\.\.2"),
        ("predicted", np.full((2, 6), -1), r"predicted must be in 0\.\.2"),
        ("predicted", np.zeros((1, 6), int), r"must hold predictions of shape \(networks, 6\)"),
        ("probabilities", np.full((2, 6), np.nan), r"probabilities must be in 0\.\.1"),
        ("changed", np.array([6]), r"changed must be in 0\.\.5"),
        ("errors", np.array([0.5]), r"errors must be in 0\.\.5"),
        ("totals", np.array([1]), "totals must be three counts"),
    ],
)
def test_a_broken_array_is_named(tmp_path, key, value, message):
    write_samples(tmp_path, choose())
    with np.load(tmp_path / SAMPLES_FILE) as file:
        arrays = dict(file)
    np.savez(tmp_path / SAMPLES_FILE, **arrays | {key: value})

    with pytest.raises(ReportError, match=rf"report_data\.npz is broken: {message}"):
        read_samples(tmp_path)


def test_a_file_of_an_older_version_has_no_predictions(tmp_path):
    images = np.zeros((32, 2, 2, 3), np.uint8)
    labels = np.zeros(32, int)
    np.savez(tmp_path / SAMPLES_FILE, images=images, labels=labels, class_names=np.array(["a"]))
    samples = read_samples(tmp_path)

    assert samples is not None
    assert samples.networks == () and samples.samples.tolist() == list(range(20))
    assert not len(samples.changed) and not len(samples.errors)
