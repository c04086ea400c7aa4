"""The settings of the network (config key `model`)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

CIFAR_DEPTHS = (20, 32, 44, 56)  # Of three stages (He et al. 2015, section 4.2).
DEPTHS = (18, 34, 50, *CIFAR_DEPTHS)
STEMS = ("cifar", "imagenet")
SHORTCUTS = ("conv", "pad")
MAX_WIDTH = 1024  # Three billion parameters in ResNet-18.
RESNET_ONLY = ("depth", "width", "stem", "shortcut")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network to train: a ResNet, or your own (config key `model`)."""

    depth: int = 18
    """Layers with weights on the longest path of the ResNet: 18, 34 or 50; or 20, 32, 44 or 56 for
    those of three stages for CIFAR-10, which are 16 wide in the literature."""

    width: int = 64
    """Channels of the first stage; each later stage doubles them. 64 is the paper's."""

    stem: str = "cifar"
    """'cifar': one 3x3 convolution; 'imagenet': 7x7 at stride 2 and a 3x3 max-pool at stride 2."""

    shortcut: str = "conv"
    """Around a block that changes size or width: 'conv', a 1x1 convolution and batch norm, or
    'pad', every other pixel and channels of zeros (option A of He et al. 2015)."""

    target: str | None = None
    """Your own network instead of a ResNet: 'package.module:Name' of a Linen or NNX module class,
    or of a function that returns such a module. The current directory is searched first."""

    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the target. `num_classes` comes from the data unless given here; NNX's
    `rngs` from the seed."""

    def __post_init__(self):
        if self.depth not in DEPTHS:
            depths = ", ".join(map(str, DEPTHS))
            raise ValueError(f"model.depth must be one of {depths}, got {self.depth!r}.")
        whole = isinstance(self.width, int) and not isinstance(self.width, bool)
        if not whole or not 1 <= self.width <= MAX_WIDTH:
            raise ValueError(
                f"model.width must be an integer in 1..{MAX_WIDTH}, got {self.width!r}."
            )
        if self.stem not in STEMS:
            raise ValueError(f"model.stem must be 'cifar' or 'imagenet', got {self.stem!r}.")
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"model.shortcut must be 'conv' or 'pad', got {self.shortcut!r}.")
        if self.shortcut == "pad" and self.depth == 50:
            raise ValueError(
                "model.shortcut 'pad' is for blocks of two convolutions, not depth 50."
            )
        if self.stem == "imagenet" and self.depth in CIFAR_DEPTHS:
            raise ValueError(f"model.stem must be 'cifar' for depth {self.depth}, got 'imagenet'.")
        if self.target is None and self.arguments:
            raise ValueError("model.arguments are those of model.target, which is not set.")
        if self.target is not None:
            self._check_target(self.target)
        _check_plain(self.arguments, "model.arguments")

    def _check_target(self, target: str) -> None:
        module, colon, name = target.partition(":")
        parts = (*module.split("."), *name.split("."))
        if not colon or not all(part.isidentifier() for part in parts):
            raise ValueError(
                "model.target must be 'package.module:Name', such as 'my_models:SmallNet', "
                f"got {target!r}."
            )
        for field in dataclasses.fields(self):
            if field.name in RESNET_ONLY and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"model.{field.name} is a setting of the ResNet; with model.target, pass "
                    f"model.arguments.{field.name}."
                )


def _check_plain(value: Any, key: str) -> None:
    """Check that a value is of JSON, so that the config can be written and compared."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{key} must have text as keys, got {name!r}.")
            _check_plain(each, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            _check_plain(each, f"{key}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be finite, got {value!r}.")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(
            f"{key} must be text, a number, true, false, null, a list or a mapping, got {value!r}."
        )
