"""The config: types, error messages, hash."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_run import SETTINGS, tiny

from jaxqat.pipeline import config as configs
from jaxqat.pipeline.config import ConfigError, Experiment
from jaxqat.quant import Rule

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_an_experiment_survives_yaml(tmp_path):
    experiment = tiny(quant={"rules": [{"path": "head", "weight_bits": 4}]})
    assert experiment.quant.rules == (Rule(path="head", weight_bits=4),)
    path = tmp_path / "config.yaml"
    path.write_text(configs.to_yaml(experiment))
    assert configs.load(path) == experiment


def test_missing_settings_have_the_defaults_of_their_section():
    assert configs.from_dict({}) == Experiment()
    # A setting of qat.optimizer keeps QAT's own learning rate, not FP32's.
    experiment = configs.from_dict({"qat": {"optimizer": {"momentum": 0.5}}})
    assert experiment.qat.optimizer.learning_rate == 1e-3
    assert experiment.qat.optimizer.momentum == 0.5


@pytest.mark.parametrize(
    ("settings", "key", "right"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"qat": {"epoch": 1}}, "qat.epoch", "qat.epochs"),
        (
            {"fp32": {"optimizer": {"learning_rat": 1}}},
            "fp32.optimizer.learning_rat",
            "fp32.optimizer.learning_rate",
        ),
        ({"quant": {"rules": [{"wight_bits": 4}]}}, "quant.rules.wight_bits", "weight_bits"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(settings, key, right):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'.*{right}'"):
        configs.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"seed": "one"}, "seed"),
        ({"qat": {"epochs": 1.5}}, "qat.epochs"),
        ({"fp32": {"optimizer": {"nesterov": "perhaps"}}}, "fp32.optimizer.nesterov"),
        ({"precision": "fp16"}, "precision"),
        ({"quant": {"rules": [{"weight_bits": "four"}]}}, "quant.rules"),
        ({"fp32": 3}, "fp32"),
        ({"fp32": {"optimizer": None}}, "fp32.optimizer"),
        ({"quant": {"rules": ["head"]}}, "quant.rules"),
    ],
)
def test_a_value_of_a_wrong_type_names_its_key(settings, key):
    with pytest.raises(ConfigError, match=f'"{key}"'):
        configs.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp32": {"epochs": 0}}, "fp32.epochs must be 1 or more, got 0"),
        ({"fp32": {"batch_size": 0}}, "fp32.batch_size must be 1 or more, got 0"),
        ({"fp32": {"label_smoothing": 1.0}}, "fp32.label_smoothing must be in"),
        ({"fp32": {"steps_per_dispatch": 0}}, "fp32.steps_per_dispatch must be 1 or more"),
        (
            {"qat": {"optimizer": {"learning_rate": -1}}},
            "qat.optimizer.learning_rate must be > 0, got -1",
        ),
        (
            {"qat": {"epochs": 2, "optimizer": {"warmup_epochs": 2}}},
            r"qat.optimizer.warmup_epochs must be below epochs \(2\), got 2",
        ),
        ({"qat": {"calibration_batches": 0}}, "qat.calibration_batches must be 1 or more"),
        ({"qat": {"epochs": 2, "freeze_epochs": 3}}, "qat.freeze_epochs must be in 0..2"),
        ({"quant": {"weight_bits": 9}}, "quant.weight_bits must be an integer in 2..8"),
        ({"quant": {"rules": [{"weight_bits": 1}]}}, "quant.rules.weight_bits must be"),
        ({"model": {"depth": 19}}, "model.depth must be one of 18, 34, 50, 20, 32, 44, 56, got 19"),
        ({"data": {"validation_size": -1}}, "data.validation_size must be >= 0"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last must be 1 or more"),
        ({"seed": -1}, "seed must be in"),
        ({"evaluation_batch_size": 0}, "evaluation_batch_size must be 1 or more"),
        ({"name": "\ud800"}, "name must be printable text"),
        ({"data": {"data_dir": "a\0b"}}, "data.data_dir must be printable text"),
        ({"seed": None}, "seed must be int, got null"),
        ({"augment": {"crop_padding": 10**6}}, "augment.crop_padding must be in 0..4096"),
        ({"select": "best"}, "select 'best' needs a validation split"),
    ],
)
def test_a_value_out_of_range_names_its_dotted_key_once(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        configs.from_dict(settings)


@pytest.mark.parametrize(
    ("epochs", "freeze_epochs", "first"),
    [(30, None, 25), (5, None, 5), (2, None, 2), (1, None, 2), (4, 0, 5), (4, 4, 1), (9, None, 9)],
)
def test_the_last_fifth_of_fine_tuning_is_frozen_by_default(epochs, freeze_epochs, first):
    config = tiny(qat__epochs=epochs, qat__freeze_epochs=freeze_epochs).qat
    assert config.frozen_from == first


def test_the_hash_depends_on_every_setting_and_on_nothing_else():
    reordered = dict(reversed(SETTINGS.items()))
    assert configs.config_hash(configs.from_dict(reordered)) == configs.config_hash(tiny())
    assert configs.config_hash(tiny(seed=1)) != configs.config_hash(tiny())
    assert configs.config_hash(tiny(qat__batch_size=17)) != configs.config_hash(tiny())


def test_differences_are_dotted_keys_with_both_values():
    changed = tiny(seed=4, data__train_limit=None, quant={"rules": [{"path": "head"}]})
    rule = json.dumps([dataclasses.asdict(Rule(path="head"))])
    assert configs.differences(tiny(), changed) == [
        "data.train_limit: 100 -> null",
        f"quant.rules: [] -> {rule}",
        "seed: 0 -> 4",
    ]
    assert configs.differences(tiny(), tiny()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp32: {epochs: [", "is not YAML"),
        ("- 1\n", "must hold settings"),
        ("", "must hold settings"),
        ("fp32: {epoch: 1}", "unknown key 'fp32.epoch'"),
        ("fp32: {epochs: 0}", "fp32.epochs must be 1 or more"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"broken.yaml: .*{message}"):
        configs.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read"):
        configs.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_the_project_are_named_after_their_files_and_say_their_command(path):
    assert configs.load(path).name == path.stem
    assert f"jaxqat train --config configs/{path.name} --workdir runs/{path.stem}" in (
        path.read_text()
    )
