import dataclasses
import json
import math

import numpy as np
import pytest

from jaxqat.integer._store.typed_json import TypedJson
from jaxqat.pipeline.metrics import classification_metrics
from jaxqat.pipeline.results import Scores, to_json

HAND_LABELS = np.array([0, 0, 1, 1, 2])
HAND_PREDICTED = np.array([0, 1, 1, 1, 0])


def one_hot_logits(predicted, k, height=5.0):
    return height * np.eye(k)[predicted]


def reference(labels, predicted, k):
    """Compute the scores from their definitions, image by image."""
    confusion = [[0] * k for _ in range(k)]
    for true, guess in zip(labels, predicted, strict=True):
        confusion[true][guess] += 1
    rows = []
    for i in range(k):
        hits = confusion[i][i]
        guessed = sum(confusion[j][i] for j in range(k))
        support = sum(confusion[i])
        precision = hits / guessed if guessed else 0.0
        recall = hits / support if support else 0.0
        f1 = 2 * hits / (guessed + support) if guessed + support else 0.0
        rows.append((precision, recall, f1, support))
    return confusion, rows


def test_scores_are_those_counted_by_hand():
    logits = one_hot_logits(HAND_PREDICTED, 3)
    scores = classification_metrics(HAND_LABELS, logits, ["a", "b", "c"])

    assert scores.confusion_matrix == ((1, 1, 0), (0, 2, 0), (1, 0, 0))
    assert scores.n == 5
    # Class b: 2 of 3 predictions correct, both of its images found, F1 = 2·(2/3)/(5/3) = 4/5.
    # At most three float64 roundings.
    expected = {"accuracy": 3 / 5, "precision": 7 / 18, "recall": 1 / 2, "f1": 13 / 30}
    assert {key: getattr(scores, key) for key in expected} == pytest.approx(expected, rel=4e-16)
    assert dataclasses.asdict(scores.per_class[1]) == {
        "name": "b",
        "precision": pytest.approx(2 / 3, rel=4e-16),
        "recall": 1.0,
        "f1": pytest.approx(4 / 5, rel=4e-16),
        "support": 2,
    }


@pytest.mark.filterwarnings("error")
def test_class_without_images_or_predictions_counts_as_zero_in_the_macro_averages():
    logits = one_hot_logits(np.array([0, 1]), 4)
    scores = classification_metrics(np.array([0, 1]), logits, list("abcd"))

    assert [row.support for row in scores.per_class] == [1, 1, 0, 0]
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)
    assert scores.confusion_matrix[2:] == ((0, 0, 0, 0), (0, 0, 0, 0))


@pytest.mark.parametrize("k", [2, 10, 100])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_an_image_by_image_count(seed, k):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(k - 1, 1), size=300)  # The last class has no images.
    logits = rng.normal(size=(300, k)).astype(np.float32) + np.eye(k)[labels]
    scores = classification_metrics(labels.astype(np.int32), logits, [str(i) for i in range(k)])

    confusion, rows = reference(labels, logits.argmax(1), k)
    assert scores.confusion_matrix == tuple(map(tuple, confusion))
    assert [row.support for row in scores.per_class] == [row[3] for row in rows]
    for column, key in enumerate(("precision", "recall", "f1")):
        values = [row[column] for row in rows]
        # Each is one or two quotients, so within a few units of float64's 2**-53; the
        # mean adds k of them.
        np.testing.assert_allclose(
            [getattr(row, key) for row in scores.per_class], values, rtol=2**-50
        )
        np.testing.assert_allclose(
            getattr(scores, key), math.fsum(values) / k, rtol=(k + 8) * 2**-53
        )


def test_loss_of_a_confident_correct_prediction_keeps_its_digits():
    logits = np.array([[20.0, 0.0]], np.float32)
    loss = classification_metrics(np.array([0]), logits, ["a", "b"]).loss

    # Float32 would give 0. In float64, 1 + exp(-20) is rounded to 2**-53 of 1 before its log.
    assert loss == pytest.approx(math.log1p(math.exp(-20)), abs=2**-52)


def test_loss_of_huge_logits_is_finite_and_exact():
    logits = np.array([[-1e30, 1e30], [3.0, 3.0]])
    loss = classification_metrics(np.array([0, 0]), logits, ["a", "b"]).loss

    assert loss == (2e30 + math.log(2)) / 2  # The second image's loss is below the rounding.


def test_equal_logits_predict_the_first_class():
    scores = classification_metrics(np.array([0, 2]), np.zeros((2, 3)), list("abc"))

    assert scores.confusion_matrix == ((1, 0, 0), (0, 0, 0), (1, 0, 0))


def test_scores_survive_json():
    labels = np.array([0, 1, 2], np.int32)
    scores = classification_metrics(labels, np.eye(3, dtype=np.float32), ["a", "b", "c"])

    assert TypedJson().decode(json.loads(json.dumps(to_json(scores))), Scores) == scores


@pytest.mark.parametrize(
    ("labels", "logits", "names", "message"),
    [
        ([0, 3], np.zeros((2, 3)), "abc", r"labels must be in 0\.\.2, got 0\.\.3"),
        ([-1, 0], np.zeros((2, 3)), "abc", r"labels must be in 0\.\.2, got -1\.\.0"),
        ([0.0, 1.0], np.zeros((2, 3)), "abc", "labels must be integers, got float64"),
        ([0], np.zeros((2, 3)), "abc", r"got shapes \(1,\) and \(2, 3\)"),
        (np.zeros(0, int), np.zeros((0, 3)), "abc", "n of at least 1"),
        ([0, 1], np.zeros((2, 3)), "ab", "must name the 3 columns of the logits, got 2"),
        ([0, 1], np.array([[0, 1], [np.nan, 0]]), "ab", "those of image 1 are"),
        ([0, 1], np.array([[np.inf, 1], [0, 0]]), "ab", "those of image 0 are"),
    ],
)
def test_errors_of_invalid_predictions_name_the_values(labels, logits, names, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(labels), logits, list(names))
