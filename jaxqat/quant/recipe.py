# pyright: strict
"""What a user decides about quantization: bits, grids and exceptions, as plain data."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, Literal, Self, cast, get_args

from jaxqat.errors import RecipeError

KINDS = ("any", "conv", "dense", "embed", "attention")
INHERIT = "inherit"

Kind = Literal["any", "conv", "dense", "embed", "attention"]
Granularity = Literal["per_channel", "per_tensor", "per_group"]
WeightRange = Literal["absmax", "percentile", "mse", "snr", "lsq"]
Activations = Literal["affine", "symmetric"]
Rounding = Literal["nearest", "stochastic"]
ActRange = Literal["ema", "minmax", "percentile", "mse", "snr", "lsq", "pact", "dynamic"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "weight_granularity": get_args(Granularity),
    "weight_range": get_args(WeightRange),
    "activations": get_args(Activations),
    "act_range": get_args(ActRange),
    "rounding": get_args(Rounding),
}


def _check_bits(key: str, weight_bits: object, act_bits: object) -> None:
    for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        allowed = bits is None or (bits == INHERIT and key == "quant.rules")
        if not allowed and (type(bits) is not int or not 2 <= bits <= 8):
            raise RecipeError(f"{key}.{name} must be an integer in 2..8 or null, got {bits!r}.")
    if (weight_bits is None) != (act_bits is None):
        raise RecipeError(
            f"{key}.weight_bits and {key}.act_bits must both be set or both be null: an integer "
            f"product needs integers on both sides, got {weight_bits!r} and {act_bits!r}."
        )


def _check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RecipeError(f"{key} must be one of {', '.join(choices)}, got {value!r}.")


def _check_numbers(key: str, settings: Any) -> None:
    percentile, group_size = settings.percentile, settings.group_size
    is_number = isinstance(percentile, int | float)
    if percentile is not None and not (is_number and 50 < percentile <= 100):
        raise RecipeError(f"{key}.percentile must be in (50, 100], got {percentile!r}.")
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise RecipeError(f"{key}.group_size must be a whole number from 1, got {group_size!r}.")


def _check_axis(value: object) -> None:
    names = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    valid = bool(names) and all(isinstance(name, str) and name for name in names)
    if value is not None and not (valid and len(set(names)) == len(names)):
        raise RecipeError(
            "quant.range_axis must be the name of a mapped axis, several different names, or null, "
            f"got {value!r}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How one layer is quantized; a `Recipe` has the defaults, its `Rule`s have exceptions.

    A table of embeddings uses the settings of weights, with rows as channels. A product of two
    activations uses the settings of activations for both.

    Attributes:
        weight_bits: Width of the weight codes, 2 to 8; null leaves the layer in float.
        act_bits: Width of the codes of the layer's input, 2 to 8; null leaves it in float.
        weight_granularity: Weights that share one scale: 'per_channel' (each output channel),
            'per_tensor', or 'per_group' (each `group_size` inputs of an output; dense layers).
        group_size: Inputs that share a scale under 'per_group'.
        weight_range: Method that sets the largest weight with a code: 'absmax', the largest
            magnitude; 'percentile' of the magnitudes; 'mse', the fraction of the largest with the
            least squared error; 'snr', the same search by AQT; 'lsq', learned step sizes (Esser et
            al. 2020, arXiv:1902.08153).
        activations: 'affine' (an integer zero point, all 2**bits codes) or 'symmetric' (zero
            point 0, the weights' codes).
        act_range: Method that sets the range of the input's codes: 'ema', moving averages of each
            batch's minimum and maximum; 'minmax', the extremes of all batches; 'percentile', 'mse'
            or 'snr', moving averages of each batch's range of that kind; 'lsq', a learned step
            size; 'pact', a learned clipping bound (Choi et al. 2018, arXiv:1805.06085); 'dynamic',
            the largest magnitude of each example, AQT's default (needs 'symmetric').
        percentile: Percentile that 'percentile' ranges end at; the same share is left out at the
            lower end of activations.
        rounding: Rounding of weights while ranges move in training: to the 'nearest' code, or
            'stochastic', up with the probability of the fractional part (Gupta et al. 2015,
            arXiv:1502.02551, section 3), seeded by the count of the layer's activation range.
            Inference always rounds to the nearest code.
    """

    weight_bits: int | None = 8
    act_bits: int | None = 8
    weight_granularity: Granularity = "per_channel"
    group_size: int = 64
    weight_range: WeightRange = "absmax"
    activations: Activations = "affine"
    act_range: ActRange = "ema"
    percentile: float = 99.9
    rounding: Rounding = "nearest"

    def __post_init__(self):
        _check_bits("quant", self.weight_bits, self.act_bits)
        for name, choices in _CHOICES.items():
            _check_choice(f"quant.{name}", getattr(self, name), choices)
        _check_numbers("quant", self)
        if self.act_range == "dynamic" and self.activations != "symmetric":
            raise RecipeError(
                "quant.act_range 'dynamic' needs quant.activations 'symmetric': integer products "
                f"take no zero point per example here, got {self.activations!r}."
            )
        if self.act_range == "dynamic" and self.rounding == "stochastic":
            raise RecipeError(
                "quant.rounding 'stochastic' takes its seed from the count of an activation range, "
                "and there is none where quant.act_range is 'dynamic'."
            )
        if self.weight_granularity == "per_group" and self.weight_range == "lsq":
            raise RecipeError(
                "quant.weight_range 'lsq' learns one step size per channel or per tensor, and "
                "quant.weight_granularity is 'per_group'."
            )


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Exceptions for the layers whose path and kind match; the first matching rule wins.

    A field that a rule does not set ('inherit' for bits, null for all others) has the recipe's
    value. `Settings` documents all fields but the first two.

    Attributes:
        path: Regular expression, matched in full against a module path such as
            'stage2/block0/conv1'.
        kind: 'conv', 'dense', 'embed' (a table of embeddings), 'any' of these three, or
            'attention' (a product of two activations; only a rule of this kind quantizes it).
    """

    path: str = ".*"
    kind: Kind = "any"
    weight_bits: int | Literal["inherit"] | None = INHERIT
    act_bits: int | Literal["inherit"] | None = INHERIT
    weight_granularity: Granularity | None = None
    group_size: int | None = None
    weight_range: WeightRange | None = None
    activations: Activations | None = None
    act_range: ActRange | None = None
    percentile: float | None = None
    rounding: Rounding | None = None

    def __post_init__(self):
        _check_bits("quant.rules", self.weight_bits, self.act_bits)
        _check_choice("quant.rules.kind", self.kind, KINDS)
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                _check_choice(f"quant.rules.{name}", getattr(self, name), choices)
        _check_numbers("quant.rules", self)
        try:
            re.compile(self.path)
        except re.error as error:
            raise RecipeError(
                f"quant.rules.path must be a regular expression, got {self.path!r}: {error}."
            ) from None

    def matches(self, path: str, kind: str) -> bool:
        """Return whether a layer of this path and kind matches."""
        named = kind == self.kind or (self.kind == "any" and kind != "attention")
        return named and re.fullmatch(self.path, path) is not None

    def over(self, default: Settings) -> Settings:
        """Return the settings of a layer that matches, given the recipe's.

        Raises:
            RecipeError: The rule contradicts the settings that it inherits.
        """
        values = {name: getattr(default, name) for name in SETTINGS}
        for name in SETTINGS:
            value, bits = getattr(self, name), name in ("weight_bits", "act_bits")
            if value != INHERIT and (bits or value is not None):
                values[name] = value
        try:
            return Settings(**values)
        except RecipeError as error:
            raise RecipeError(f"the rule path={self.path!r}, kind={self.kind!r}: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """How a model is quantized; the defaults are the preset `int8`.

    Weights are symmetric, with codes -(2**(bits-1)-1) .. 2**(bits-1)-1. Activations have one
    scale per tensor (Krishnamoorthi 2018, arXiv:1806.08342, section 3.1): affine, with an
    integer zero point and all 2**bits codes, or symmetric, with the weights' codes. The fields of
    `Settings` apply to layers that match no rule.

    Attributes:
        range_decay: Decay per training step of the moving averages of activation ranges, 0 up to
            (not including) 1.
        range_axis: Name or names of the mapped axes (`jax.shard_map`, `jax.pmap`) over which a
            batch is split, as `axis_name` of Flax's BatchNorm: ranges are then those of the whole
            batch. 'percentile', 'mse' and 'snr' gather every tensor that they observe on every
            device. Null outside such axes, and under `jax.jit` with sharded arrays. Ranges and
            codes of inference do not depend on it.
        first_last_bits: Width of weights and activations in the first and the last layer, unless
            a rule matches them; null uses the width of all other layers.
        rules: Exceptions, in order; the first match wins.
    """

    range_decay: float = 0.99
    range_axis: str | tuple[str, ...] | None = None
    first_last_bits: int | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.range_decay < 1:
            raise RecipeError(f"quant.range_decay must be in [0, 1), got {self.range_decay!r}.")
        if isinstance(self.range_axis, list):  # As YAML reads it; a recipe is hashable.
            object.__setattr__(self, "range_axis", tuple(self.range_axis))
        _check_axis(self.range_axis)
        edge = self.first_last_bits
        if edge is not None and (type(edge) is not int or not 2 <= edge <= 8):
            raise RecipeError(
                f"quant.first_last_bits must be an integer in 2..8 or null, got {edge!r}."
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            rule.over(self)

    @property
    def range_axes(self) -> tuple[str, ...]:
        """The names in `range_axis`."""
        if self.range_axis is None:
            return ()
        return (self.range_axis,) if isinstance(self.range_axis, str) else self.range_axis

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the recipe of this name.

        'int8' has affine activations, 'int8_symmetric' the zero point 0, and 'int8_dynamic' one
        range per example (AQT's default). Two names stand for a deployment: 'onnxruntime_x86' is
        'int8', whose codes are uint8 in the exported file; 'tensorrt', which has no zero points,
        is 'int8_symmetric'. 'w4a8' and 'w4a4' have 4-bit weights with 8-bit or 4-bit activations.
        'w4a4_lsq' and 'w2a2_lsq' learn their step sizes, with 8 bits in the first and the last
        layer.

        Raises:
            RecipeError: There is no such preset.
        """
        presets = cls.presets()
        if name not in presets:
            near = difflib.get_close_matches(str(name), presets, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"recipe must be one of {', '.join(presets)}, got {name!r}.{hint}")
        return presets[name]

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Return all presets by name (`preset`); the usual name of a recipe comes first."""
        symmetric = cls(activations="symmetric")
        lsq = cls(weight_range="lsq", act_range="lsq", first_last_bits=8)
        return {
            "int8": cls(),
            "int8_symmetric": symmetric,
            "int8_dynamic": cls(activations="symmetric", act_range="dynamic"),
            "onnxruntime_x86": cls(),
            "tensorrt": symmetric,
            "w4a8": cls(weight_bits=4),
            "w4a4": cls(weight_bits=4, act_bits=4),
            "w4a4_lsq": dataclasses.replace(lsq, weight_bits=4, act_bits=4),
            "w2a2_lsq": dataclasses.replace(lsq, weight_bits=2, act_bits=2),
        }

    def settings(self, path: str, kind: str, *, at_edge: bool = False) -> Settings | None:
        """Return the settings of a layer; None leaves it in float.

        Args:
            path: Path of its module.
            kind: 'conv', 'dense', 'embed' or 'attention'.
            at_edge: Whether it is the first or the last layer of the model.
        """
        rule = next((rule for rule in self.rules if rule.matches(path, kind)), None)
        if rule is None and kind == "attention":
            return None
        edge = self.first_last_bits if rule is None and at_edge else None
        if edge is not None and self.weight_bits is not None:
            rule = Rule(weight_bits=edge, act_bits=edge)
        settings = (rule or Rule()).over(self)
        return None if settings.weight_bits is None else settings

    def check_rules(self, layers: Sequence[tuple[str, str]]) -> None:
        """Raise an error for a rule that decides about no layer.

        Args:
            layers: Path and kind of every layer of the model that can be quantized.

        Raises:
            RecipeError: A rule matches no layer, or only layers that earlier rules match. The
                message names the rule and the nearest paths.
        """
        for number, rule in enumerate(self.rules):
            matched = [layer for layer in layers if rule.matches(*layer)]
            left = [x for x in matched if not any(r.matches(*x) for r in self.rules[:number])]
            if matched and not left:
                raise RecipeError(
                    f"quant.rules: every layer that the rule path={rule.path!r}, "
                    f"kind={rule.kind!r} matches is taken by a rule before it; the first match "
                    "wins, so put the more specific rule first."
                )
            if not matched:
                paths = [path for path, _ in layers]
                near = difflib.get_close_matches(rule.path, paths, 3, cutoff=0.3) or paths[:3]
                raise RecipeError(
                    f"quant.rules: the rule path={rule.path!r}, kind={rule.kind!r} matches none of "
                    f"the {len(paths)} layers; the nearest paths are {', '.join(near) or 'none'}."
                )
