"""The config of an experiment, composed of the config dataclasses of the pipeline's parts.

An experiment is read from YAML and from options such as `--qat.epochs 1`, with types checked by
jsonargparse. The hash of its canonical JSON identifies it: a run folder belongs to one experiment.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import reprlib
import typing
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from jaxqat.errors import InputError
from jaxqat.integer._store.files import read_regular
from jaxqat.pipeline.bounded_yaml import MAX_BYTES
from jaxqat.pipeline.reading import parse_settings
from jaxqat.pipeline.settings.checkpoint import CheckpointConfig
from jaxqat.pipeline.settings.data import AugmentConfig, DataConfig
from jaxqat.pipeline.settings.model import ModelConfig
from jaxqat.pipeline.settings.training import COMPILATIONS, QatConfig, StageConfig
from jaxqat.quant.recipe import Recipe

PRECISIONS = ("float32", "tf32", "bfloat16")
LARGEST = 2**32  # Of a whole number, in magnitude.


class ConfigError(InputError):
    """An unusable setting; the message names its dotted key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run, from data to report."""

    name: str = "experiment"
    """Name of the experiment, the title of its report."""

    seed: int = 0
    """Seed of all randomness: initial weights, order of images, augmentation."""

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of products in float: float32; tf32, on devices that have it; or bfloat16 for
    activations, with float32 parameters."""

    compilation: Literal["auto", "default", "fast"] = "auto"
    """How training steps are compiled on a CPU: 'default' is XLA's way; 'fast' is that of
    `jaxqat.jit_step`, in which convolutions usually train faster; 'auto' chooses by a measurement
    of some seconds, which the run folder keeps."""

    evaluation_batch_size: int = 500
    """Images per batch in evaluation."""

    select: Literal["last", "best"] = "last"
    """Checkpoint used for the next stage and for testing: the last one, or the one with the best
    accuracy on the validation split."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data set."""

    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Augmentation: random changes to training images."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The network."""

    fp32: StageConfig = dataclasses.field(default_factory=StageConfig)
    """Training of the float network."""

    qat: QatConfig = dataclasses.field(default_factory=QatConfig)
    """Fine-tuning of the quantized network."""

    quant: Recipe = dataclasses.field(default_factory=Recipe)
    """How the network is quantized."""

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Which checkpoints are kept."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in 0..2**31 - 1, got {self.seed!r}.")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}."
            )
        if self.compilation not in ("auto", *COMPILATIONS):
            raise ValueError(
                f"compilation must be one of auto, {', '.join(COMPILATIONS)}, "
                f"got {self.compilation!r}."
            )
        if self.evaluation_batch_size < 1:
            raise ValueError(
                f"evaluation_batch_size must be 1 or more, got {self.evaluation_batch_size!r}."
            )
        if self.select not in ("last", "best"):
            raise ValueError(f"select must be 'last' or 'best', got {self.select!r}.")
        if self.select == "best" and not (self.data.validation_size and self.checkpoint.keep_best):
            raise ValueError(
                "select 'best' needs a validation split to select on: set data.validation_size, "
                "and checkpoint.keep_best to true; or select 'last'."
            )


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def to_yaml(experiment: Experiment) -> str:
    """Return the experiment as YAML, in the order of its fields."""
    return yaml.safe_dump(to_dict(experiment), sort_keys=False, allow_unicode=True)


def config_hash(experiment: Experiment) -> str:
    """Return the SHA-256 of the canonical JSON: sorted keys, no spaces.

    Without `qat.sentinel`, which changes no result.
    """
    text = json.dumps(_decisive(experiment), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Experiment, new: Experiment) -> list[str]:
    """Return every setting that differs and may change results, as 'dotted.key: old -> new'."""
    before, after = (dict(_flatten(_decisive(e))) for e in (old, new))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _decisive(experiment: Experiment) -> dict[str, Any]:
    """Return the settings that results may depend on."""
    settings = to_dict(experiment)
    del settings["qat"]["sentinel"]
    return settings


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_yaml(path: Path, also: Collection[str] = ()) -> dict[str, Any]:
    """Read the settings in a file and check their keys.

    Args:
        path: The file.
        also: Further keys that the file may have.

    Raises:
        ConfigError: If the file cannot be read, is not YAML, or has an unknown key.
    """
    values = read_settings(path)
    try:
        check_keys(Experiment, {k: v for k, v in values.items() if k not in also})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a YAML file, without checking their keys.

    Raises:
        ConfigError: If the file cannot be read, or is not YAML.
    """
    try:
        text = read_regular(path, limit=MAX_BYTES).decode()
    except (OSError, ValueError) as error:  # A path may hold a NUL.
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    return parse_settings(text, path, error=ConfigError)


def load(path: Path) -> Experiment:
    """Read the experiment in a YAML file.

    Raises:
        ConfigError: If the file cannot be read, or a setting is unknown or invalid.
    """
    values = read_yaml(path)
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_dict(values: Mapping[str, Any]) -> Experiment:
    """Return the experiment for nested settings; missing ones have their defaults.

    Raises:
        ConfigError: If a key is unknown, or a value has a wrong type or is out of range.
    """
    check_keys(Experiment, values)
    try:
        typed = _parser().parse_object(dict(values))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return build(typed)


@functools.cache
def _parser() -> jsonargparse.ArgumentParser:
    """Return the parser of nested settings, made once.

    If an exception ends jsonargparse's reading of the dataclass, it drops every setting without a
    word. A test met that once, while threads of Orbax reported a damaged checkpoint.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Experiment)
    groups: Any = parser.groups
    if "data" not in groups:
        raise RuntimeError("jsonargparse could not read the settings of Experiment; try again.")
    return parser


def build(typed: jsonargparse.Namespace) -> Experiment:
    """Return the experiment for settings that jsonargparse has parsed.

    Raises:
        ConfigError: If a value is out of range; names its dotted key.
    """
    fields = {field.name for field in dataclasses.fields(Experiment)}
    return _build(Experiment, {k: v for k, v in typed.as_dict().items() if k in fields}, "")


def _build(cls: type, values: Any, key: str) -> Any:
    if isinstance(values, jsonargparse.Namespace):  # An item of a list.
        values = values.as_dict()
    if not isinstance(values, Mapping):
        return values  # A default, or a section that jsonargparse has already built.
    hints = typing.get_type_hints(cls)
    kwargs = {
        name: _build_field(hints[name], value, f"{key}.{name}" if key else name)
        for name, value in values.items()
    }
    try:
        return cls(**kwargs)
    except ValueError as error:
        message = str(error)
        known = not key or message.startswith(key.split(".")[0] + ".")
        raise ConfigError(message if known else f"{key}.{message}") from None


def _build_field(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key)
    item = _item_dataclass(hint)
    if item is not None:
        return tuple(_build(item, entry, key) for entry in value or ())
    _check_value(hint, value, key)
    return value


def _check_value(hint: Any, value: Any, key: str) -> None:
    """Check what jsonargparse lets through: null, numbers without bound, text that is none."""
    if value is None and type(None) not in typing.get_args(hint):
        raise ConfigError(f"{key} must be {getattr(hint, '__name__', hint)}, got null.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value!r}.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(f"{key} must be at most 2**32 in magnitude, got {reprlib.repr(value)}.")
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise ConfigError(f"{key} must be printable text, got {reprlib.repr(value)}.")


def _item_dataclass(hint: Any) -> type | None:
    """Return the dataclass of a field such as tuple[Rule, ...]; None for other fields."""
    items = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
    return typing.cast(type, items[0]) if items else None


def check_keys(cls: type, values: Mapping[str, Any], key: str = "") -> None:
    """Check the keys of settings, at any depth.

    Raises:
        ConfigError: If a key is unknown; suggests the nearest one.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name, value in values.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in names:
            known = nearest(str(name), names)
            near = f"{key}.{known}" if key else known
            raise ConfigError(f"unknown key {dotted!r}; the nearest right one is {near!r}.")
        item = _item_dataclass(hints[name])
        if dataclasses.is_dataclass(hints[name]):
            _check_section(typing.cast(type, hints[name]), value, dotted)
        elif item is not None and isinstance(value, list):
            for entry in value:
                _check_section(item, entry, dotted)


def _check_section(cls: type, values: Any, key: str) -> None:
    if not isinstance(values, Mapping):
        names = ", ".join(field.name for field in dataclasses.fields(cls))
        raise ConfigError(f'"{key}" must hold settings ({names}), got {reprlib.repr(values)}.')
    check_keys(cls, values, key)


def nearest(word: str, words: list[str]) -> str:
    """Return the most similar word."""
    return difflib.get_close_matches(word, words, 1, cutoff=0.0)[0]
