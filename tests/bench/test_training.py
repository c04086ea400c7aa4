"""The training benchmark: the same training step in every precision, checked against FP32."""

import numpy as np
import pytest
import tiny_run

from jaxqat.bench import training
from jaxqat.bench.checks import BenchmarkError
from jaxqat.bench.training import FP32, QAT, Trainer, check_update, random_dataset
from jaxqat.pipeline.networks import Networks

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network

SHAPE, CLASSES, BATCH = (8, 8, 1), 10, 16


def trainer(variant=FP32, length=1):
    dataset = random_dataset(SHAPE, CLASSES, BATCH * training.STEPS_PER_EPOCH)
    networks = Networks.build(tiny_run.tiny(), dataset)
    return Trainer(networks, variant.stage, BATCH, length)


def measure(rounds=2):
    return training.benchmark_training(
        tiny_run.tiny(), image_shape=SHAPE, classes=CLASSES, batch_size=BATCH, rounds=rounds
    )


def test_every_precision_of_the_device_is_measured(small_network):
    result = measure()
    rows = {row["key"]: row for row in result["precisions"]}
    of_jax = [f"{kind}{way}" for kind in ("fp32", "bf16", "qat") for way in ("", "_fast")]
    assert [key for key in rows if not key.startswith("torch")] == of_jax
    assert result["batch_size"] == BATCH
    assert result["steps_per_call"] == 1
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert row["images_per_s"] == BATCH / np.median(row["seconds"])
        assert row["ratio_to_fp32"] == rows["fp32"]["median_s"] / row["median_s"]
        assert row["key"].startswith("torch") or row["temporary_bytes"] > 0
    np.testing.assert_allclose(rows["fp32"]["cosine_to_fp32"], 1, rtol=2**-50)
    # With operands of 8 bits the cosine falls by a few per cent; other images would give about 0.2.
    for key in of_jax[2:]:
        assert 0.9 < rows[key]["cosine_to_fp32"] < 1
    # Another order of sums only.
    assert rows["fp32_fast"]["cosine_to_fp32"] > 1 - 1e-6


def test_times_are_per_step_if_a_call_has_several(small_network, monkeypatch):
    monkeypatch.setitem(training.STEPS_PER_CALL, "cpu", 2)
    monkeypatch.setitem(training.VARIANTS, "cpu", (FP32,))
    monkeypatch.setattr(training, "alternate", lambda calls, rounds: {"fp32": [4.0] * rounds})
    result = measure()
    assert result["steps_per_call"] == 2
    assert result["precisions"][0]["median_s"] == 2.0
    assert result["precisions"][0]["images_per_s"] == BATCH / 2.0


def test_first_updates_are_those_of_one_step_for_any_steps_per_call(small_network):
    one, several = trainer(length=1).first_update(), trainer(length=3).first_update()
    for a, b in zip(one, several, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_call_runs_all_of_its_steps(small_network):
    three_steps = trainer(length=3)
    three_steps.call()()
    assert int(three_steps._state.step) == 6  # A warm-up call and the timed one.


def test_all_variants_see_the_same_images(small_network, monkeypatch):
    seen = []

    def forward(self, stage):
        module = self.modules["fp32"]

        def train(params, collections, images, key):
            del key
            seen.append(stage)
            variables = {"params": params, "batch_stats": collections["batch_stats"]}
            return module.apply(variables, images, train=True, mutable=["batch_stats"])[0], (
                collections
            )

        return train

    # Both run the float network, so only their input can differ.
    monkeypatch.setattr("jaxqat.pipeline.networks.Networks.forward", forward)
    floats, quantized = trainer(FP32).first_update(), trainer(QAT).first_update()
    assert {"fp32", "qat"} <= set(seen)
    for a, b in zip(floats, quantized, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0.0, "the cosine of the two is 0.000, expected at least 0.5"),
        (-1.0, "the cosine of the two is -1.000, expected at least 0.5"),
        (np.nan, "the update of the first training step is not finite"),
    ],
    ids=["zero", "opposite", "nan"],
)
def test_an_update_unlike_that_of_fp32_raises_an_error_with_the_precision(factor, message):
    update = [np.arange(6.0).reshape(2, 3), np.ones(2)]
    check_update("FP32", update, update)
    with pytest.raises(BenchmarkError, match="QAT: ") as refusal:
        check_update("QAT", [factor * x for x in update], update)
    assert message in str(refusal.value)


def test_notes_name_float_variants_faster_than_qat():
    rows = [
        {"key": "fp32", "label": "FP32", "median_s": 1.0},
        {"key": "bf16", "label": "bf16", "median_s": 4.0},
        {"key": "qat", "label": "QAT", "median_s": 2.0},
        {"key": "fp32_fast", "label": "FP32, fast", "median_s": 0.5},
        {"key": "qat_fast", "label": "QAT, fast", "median_s": 0.4},
        {"key": "torch_fp32", "label": "PyTorch FP32", "median_s": 0.1},
    ]
    assert training.notes(rows) == [
        "A step of QAT is slower than one of FP32 here: 0.50 times its speed."
    ]
