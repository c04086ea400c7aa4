"""What a person decides about quantization: bits, grids and exceptions, as plain data."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Literal, Self

KINDS = ("any", "conv", "dense")


class RecipeError(ValueError):
    """A recipe, or one of its rules, cannot be applied."""


def _check_bits(key: str, weight_bits: int | None, act_bits: int | None) -> None:
    for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
            raise RecipeError(f"{key}.{name} must be an integer in 2..8 or null, got {bits!r}.")
    if (weight_bits is None) != (act_bits is None):
        raise RecipeError(
            f"{key}.weight_bits and {key}.act_bits must both be set or both be null: an integer "
            f"product needs integers on both sides, got {weight_bits!r} and {act_bits!r}."
        )


def _check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RecipeError(f"{key} must be one of {', '.join(choices)}, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How the layers whose path and kind match are quantized; the first matching rule wins.

    Attributes:
        path: Regular expression, matched in full against a module path such as
            'stage2/block0/conv1'.
        kind: 'conv', 'dense' or 'any'.
        weight_bits: Width of the weight codes, 2 to 8; null leaves the layer in float.
        act_bits: Width of the codes of the layer's input, 2 to 8; null leaves it in float.
    """

    path: str = ".*"
    kind: Literal["any", "conv", "dense"] = "any"
    weight_bits: int | None = 8
    act_bits: int | None = 8

    def __post_init__(self):
        _check_bits("quant.rules", self.weight_bits, self.act_bits)
        _check_choice("quant.rules.kind", self.kind, KINDS)
        try:
            re.compile(self.path)
        except re.error as error:
            raise RecipeError(
                f"quant.rules.path must be a regular expression, got {self.path!r}: {error}."
            ) from None

    def matches(self, path: str, kind: str) -> bool:
        """Whether the layer of this path and kind is this rule's."""
        return self.kind in ("any", kind) and re.fullmatch(self.path, path) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized; the defaults are the preset `int8`.

    Weights are symmetric, with codes -(2**(bits-1)-1) .. 2**(bits-1)-1. Activations have one
    static scale per tensor (Krishnamoorthi 2018, arXiv:1806.08342, section 3.1): affine, with an
    integer zero point and all 2**bits codes, or symmetric, with the weights' codes.

    Attributes:
        weight_bits: Width of the weight codes, 2 to 8, where no rule says otherwise.
        act_bits: Width of the activation codes, 2 to 8, where no rule says otherwise.
        weight_granularity: 'per_channel' (one scale per output channel) or 'per_tensor'.
        activations: 'affine' or 'symmetric'.
        range_decay: Decay per training step of the moving average of an activation's minimum
            and maximum, 0 up to (not including) 1.
        rules: Exceptions, in order.
    """

    weight_bits: int | None = 8
    act_bits: int | None = 8
    weight_granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    activations: Literal["affine", "symmetric"] = "affine"
    range_decay: float = 0.99
    rules: tuple[Rule, ...] = ()

    def __post_init__(self):
        _check_bits("quant", self.weight_bits, self.act_bits)
        _check_choice(
            "quant.weight_granularity", self.weight_granularity, ("per_channel", "per_tensor")
        )
        _check_choice("quant.activations", self.activations, ("affine", "symmetric"))
        if not 0 <= self.range_decay < 1:
            raise RecipeError(f"quant.range_decay must be in [0, 1), got {self.range_decay!r}.")
        object.__setattr__(self, "rules", tuple(self.rules))

    @classmethod
    def preset(cls, name: str) -> Self:
        """The named recipe.

        'int8' has affine activations, 'int8_symmetric' the zero point 0. By where the network is
        to run: 'onnxruntime_x86' is 'int8', whose codes are uint8 in the exported file;
        'tensorrt', whose activations have no zero points, is 'int8_symmetric'. 'w4a8' and 'w4a4'
        have 4 bits of weights, and 8 or 4 of activations.
        """
        symmetric = cls(activations="symmetric")
        presets = {
            "int8": cls(),
            "int8_symmetric": symmetric,
            "onnxruntime_x86": cls(),
            "tensorrt": symmetric,
            "w4a8": cls(weight_bits=4),
            "w4a4": cls(weight_bits=4, act_bits=4),
        }
        if name not in presets:
            near = difflib.get_close_matches(str(name), presets, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"Recipe must be one of {', '.join(presets)}, got {name!r}.{hint}")
        return presets[name]

    def bits(self, path: str, kind: str) -> tuple[int | None, int | None]:
        """Weight bits and activation bits of the layer of this path and kind."""
        for rule in self.rules:
            if rule.matches(path, kind):
                return rule.weight_bits, rule.act_bits
        return self.weight_bits, self.act_bits

    def check_rules(self, layers: Sequence[tuple[str, str]]) -> None:
        """Refuses a rule that decides about no layer.

        Args:
            layers: Path and kind of every layer of the model that can be quantized.

        Raises:
            RecipeError: Names the rule and the nearest paths, or says that earlier rules take
                all that it matches.
        """
        for number, rule in enumerate(self.rules):
            matched = [layer for layer in layers if rule.matches(*layer)]
            left = [x for x in matched if not any(r.matches(*x) for r in self.rules[:number])]
            if matched and not left:
                raise RecipeError(
                    f"quant.rules: every layer that the rule path={rule.path!r}, "
                    f"kind={rule.kind!r} matches is taken by a rule before it; the first match "
                    "wins, so put the more special rule first."
                )
            if not matched:
                paths = [path for path, _ in layers]
                near = difflib.get_close_matches(rule.path, paths, 3, cutoff=0.3) or paths[:3]
                raise RecipeError(
                    f"quant.rules: the rule path={rule.path!r}, kind={rule.kind!r} matches none of "
                    f"the {len(paths)} layers; the nearest paths are {', '.join(near) or 'none'}."
                )
