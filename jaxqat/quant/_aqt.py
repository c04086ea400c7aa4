# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false
"""AQT's configurations as recipes.

AQT configures a product by an object: `DotGeneral` for the dot of a dense layer and its gradients,
`DotGeneralRaw` for a convolution. Of these, jaxqat takes what has the same meaning here; everything
else is an error that names the field.

The left operand is the activations, the right one the weights, as in the layers of Flax.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from aqt.jax.v2 import aqt_dot_general
from aqt.jax.v2 import calibration as aqt_calibration
from aqt.jax.v2 import config as aqt_config
from aqt.jax.v2.numerics import int_numerics, no_numerics

from jaxqat.errors import RecipeError
from jaxqat.quant._numerics import injection
from jaxqat.quant._numerics.estimators import FRACTIONS
from jaxqat.quant._plan.plan import LEARNED
from jaxqat.quant.recipe import Granularity, Recipe, WeightRange

# AQT builds its dataclasses with a decorator of its own, which type checkers do not see through.
AqtConfiguration = aqt_dot_general.DotGeneral | aqt_dot_general.DotGeneralRaw


class AqtWarning(UserWarning):
    """A recipe made from an AQT configuration computes something slightly different."""


def is_configuration(value: object) -> bool:
    """Return whether a value is an AQT configuration of a dot or a convolution."""
    return isinstance(value, AqtConfiguration)


def from_aqt(configuration: Any) -> Recipe:
    """Return the recipe that quantizes as an AQT configuration does.

    AQT's activations are symmetric and dynamic: one scale per example, from its largest magnitude.
    With AQT's default numerics (`preserve_max_val=False`) the largest magnitude is the outer edge
    of the last code's interval, max|x| / 127.5 in 8 bits; here it is that code's value,
    max|x| / 127.

    Args:
        configuration: AQT's `DotGeneral` (such as `config_v4(dlhs_bits=None)`) or, as for its
            convolutions, `DotGeneralRaw`.

    Returns:
        A recipe for all layers.

    Raises:
        RecipeError: The configuration has fields without an equivalent; the message names them.

    Warns:
        AqtWarning: The layers are quantized; it names each difference.
    """
    if not is_configuration(configuration):
        raise RecipeError(
            f"from_aqt takes AQT's DotGeneral or DotGeneralRaw, got {type(configuration).__name__}."
        )
    is_raw = isinstance(configuration, aqt_dot_general.DotGeneralRaw)
    raw: Any = configuration if is_raw else configuration.fwd
    prefix = "" if is_raw else "fwd."
    problems = list(_problems_of_product(raw, prefix))
    if not is_raw:
        problems += _problems_of_gradients(configuration)
    if problems:
        raise _unmapped(problems)
    sides = raw.dg_quantizer.lhs, raw.dg_quantizer.rhs
    differences = list(_differences(*sides))
    if not (is_raw or _is_float(sides[1])) and not (
        configuration.dlhs.rhs.use_fwd_quant and configuration.drhs.rhs.use_fwd_quant
    ):
        differences.append(
            "gradients multiply by quantized operands, where AQT takes the float ones "
            "(use_fwd_quant=False)"
        )
    if differences:
        text = "; ".join(differences)
        warnings.warn(f"Differences from the AQT configuration: {text}.", AqtWarning, stacklevel=2)
    return _recipe(*sides)


def to_aqt(recipe: Recipe | str, *, bound: float | None = None) -> Any:
    """Return the AQT configuration of a dense layer that quantizes as a recipe does.

    Inject it by AQT's own `AqtDotGeneral`, or pass it to `jax.lax.dot_general`'s callers:

        configuration = jaxqat.aqt.to_aqt("int8_dynamic")
        nn.Dense(10, dot_general_cls=lambda: AqtDotGeneral(configuration))

    In float32, codes and sums are equal; AQT scales the sums twice, which rounds once more.
    Gradients are float products of the quantized operands, as here. Where values are clipped, they
    differ: AQT's end at the last code's value, not half a unit beyond it, and reach every weight,
    also those that weight_range 'snr' clips.

    A static range does not move in AQT: its calibrations with a state cannot be differentiated
    under the versions of JAX that jaxqat takes. So a static recipe needs the bound that calibration
    or training has found.

    Args:
        recipe: A `Recipe` or the name of a preset.
        bound: Largest magnitude of the layer's input, of a recipe with symmetric activations and
            any `act_range` but 'dynamic': max(-min, max) of its range.

    Returns:
        AQT's `DotGeneral`. Of a dynamic recipe, `from_aqt` returns the recipe again.

    Raises:
        RecipeError: The recipe has fields without an equivalent, or the bound is missing, not
            positive or not finite; the message names them.
    """
    found: Any = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(found, Recipe):
        raise RecipeError(
            "to_aqt takes a jaxqat.Recipe or the name of a preset such as 'int8_dynamic', got "
            f"{type(found).__name__}."
        )
    problems = _problems_of_bound(bound)
    if found.weight_bits is not None:
        problems += _problems_of_recipe(found, bound)
    elif found.rules:
        problems.append(_RULES)
    if problems:
        raise RecipeError(
            f"The recipe has fields without an equivalent in AQT: {'; '.join(problems)}. "
            "`jaxqat.aqt.dot_general_cls` injects such a recipe into a layer."
        )
    if found.weight_bits is None:
        return aqt_config.default_unquantized_config()
    configuration: Any = aqt_config.config_v4(dlhs_bits=None, drhs_bits=None)
    configuration.dlhs.rhs.use_fwd_quant = configuration.drhs.rhs.use_fwd_quant = True
    quantizer = configuration.fwd.dg_quantizer
    quantizer.lhs.numerics = injection.symmetric(found.act_bits or 8)
    quantizer.rhs.numerics = injection.symmetric(found.weight_bits)
    if bound is not None:
        quantizer.lhs.numerics.clip_gradient = True
        quantizer.lhs.calibration = functools.partial(
            cast("Any", aqt_calibration.ConstantCalibration), bound=float(bound)
        )
    if found.weight_granularity == "per_tensor":
        quantizer.rhs.calib_shared_axes = "per_tensor"
    if found.weight_range == "snr":
        quantizer.rhs.calibration = functools.partial(
            cast("Any", aqt_calibration.SnrBasedAutoCalibration),
            auto_clip_search_config=tuple(FRACTIONS),
        )
    return configuration


_RULES = "rules or first_last_bits (a configuration is that of one layer)"


def _problems_of_bound(bound: object) -> list[str]:
    if bound is None:
        return []
    limits = np.finfo(np.float32)
    low, high = 256 * float(limits.tiny), float(limits.max)
    number = isinstance(bound, float | int | np.floating) and not isinstance(bound, bool)
    if number and low <= float(cast("float", bound)) <= high:
        return []
    return [f"bound {bound!r} (a positive number that float32 can hold)"]


def _problems_of_recipe(recipe: Recipe, bound: float | None) -> list[str]:
    problems: list[str] = []
    if recipe.activations != "symmetric":
        problems.append(f"activations {recipe.activations!r} (AQT's are symmetric)")
    elif recipe.act_range in LEARNED:
        problems.append(f"act_range {recipe.act_range!r} (learned)")
    elif recipe.act_range == "dynamic" and bound is not None:
        problems.append(f"act_range 'dynamic' with a bound, {bound!r}")
    elif recipe.act_range != "dynamic" and bound is None:
        problems.append(f"act_range {recipe.act_range!r} without a bound (pass `bound`)")
    if recipe.weight_granularity == "per_group":
        problems.append("weight_granularity 'per_group'")
    if recipe.weight_range not in ("absmax", "snr"):
        problems.append(f"weight_range {recipe.weight_range!r}")
    if recipe.rounding != "nearest":
        problems.append(f"rounding {recipe.rounding!r}")
    if recipe.rules or recipe.first_last_bits is not None:
        problems.append(_RULES)
    return problems


def _recipe(data: Any, weights: Any) -> Recipe:
    """Return the recipe of two quantizers without problems."""
    if _is_float(weights):
        return Recipe(weight_bits=None, act_bits=None)
    granularity: Granularity = "per_channel"
    if weights.calib_shared_axes == "per_tensor":
        granularity = "per_tensor"
    weight_range: WeightRange = "snr" if _searches(weights) else "absmax"
    return Recipe(
        weight_bits=_bits(weights),
        act_bits=_bits(data),
        weight_granularity=granularity,
        weight_range=weight_range,
        activations="symmetric",
        act_range="dynamic",
    )


def _differences(data: Any, weights: Any) -> Iterator[str]:
    """Yield what a user should know about the recipe of two quantizers without problems."""
    if _is_float(weights):
        return
    yield (
        "activations are dynamic, with one scale per example (act_range 'dynamic'), so `convert` "
        "makes no integer network of the model"
    )
    sides = (data, weights)
    edges = sorted({s.numerics.get_quant_bound() for s in sides if not s.numerics.preserve_max_val})
    if edges:
        bounds = ", ".join(f"by {edge - 0.5:g}, not by {edge:g}" for edge in edges)
        yield (
            "the largest magnitude becomes the last code, not the edge of its interval "
            f"(preserve_max_val=False): it is divided {bounds}"
        )
    if _searches(weights):
        yield f"the search for weight scales tries {len(FRACTIONS)} fractions of its own"


def _unmapped(problems: list[str]) -> RecipeError:
    fields = "; ".join(problems)
    return RecipeError(f"The AQT configuration has fields without an equivalent here: {fields}.")


def _problems_of_product(raw: Any, prefix: str) -> Iterator[str]:
    """Yield the fields of a forward product that have no equivalent."""
    if raw.local_aqt is not None:
        yield f"{prefix}local_aqt={raw.local_aqt!r} (use Recipe(weight_granularity='per_group'))"
    for name in ("lhs", "rhs"):
        side = getattr(raw, name)
        if side.dequant_mode is not aqt_dot_general.DequantMode.OUTPUT:
            yield f"{prefix}{name}.dequant_mode={side.dequant_mode.name} (products are of integers)"
        if side.calibration_mode is not aqt_dot_general.CalibrationMode.CONTRACTING_AXIS:
            yield f"{prefix}{name}.calibration_mode={side.calibration_mode.name}"
    quantizer = raw.dg_quantizer
    if not isinstance(quantizer, aqt_dot_general.DefaultDotGeneralQuantizer):
        yield f"{prefix}dg_quantizer of type {type(quantizer).__name__}"
        return
    prefix += "dg_quantizer."
    for name in ("lhs_mid_alpha", "rhs_mid_alpha"):
        if (alpha := getattr(quantizer, name)) is not None:
            yield f"{prefix}{name}={alpha!r}"
    data, weights = quantizer.lhs, quantizer.rhs
    yield from _problems_of_numerics(data, f"{prefix}lhs")
    yield from _problems_of_numerics(weights, f"{prefix}rhs")
    if (_bits(data) is None) != (_bits(weights) is None):
        yield (
            f"numerics of one side only ({prefix}lhs: {_bits(data)} bits, {prefix}rhs: "
            f"{_bits(weights)}): an integer product needs integers on both sides"
        )
    yield from _problems_of_calibration(data, f"{prefix}lhs", of_weights=False)
    yield from _problems_of_calibration(weights, f"{prefix}rhs", of_weights=True)


def _problems_of_gradients(configuration: Any) -> Iterator[str]:
    for name in ("dlhs", "drhs"):
        quantizer = getattr(configuration, name).dg_quantizer
        sides = [getattr(quantizer, side, None) for side in ("lhs", "rhs")]
        if not all(side is not None and _is_float(side) for side in sides):
            bits = [_bits(side) if side is not None else None for side in sides]
            yield (
                f"{name} with quantized gradients ({bits[0]} and {bits[1]} bits; gradients are "
                f"float here: pass {name}_bits=None to AQT's configuration)"
            )


def _problems_of_numerics(quantizer: Any, name: str) -> Iterator[str]:
    numerics = quantizer.numerics
    if _is_float(quantizer):
        return
    if not isinstance(numerics, int_numerics.IntSymmetric):
        yield f"{name}.numerics of type {type(numerics).__name__}"
        return
    fields = cast("Any", numerics)
    if not 2 <= fields.bits <= 8:
        yield f"{name}.numerics.bits={fields.bits!r} (2 to 8)"
    for field, value in (("preserve_zero", True), ("clip", True), ("round", True)):
        if getattr(fields, field) is not value:
            yield f"{name}.numerics.{field}={getattr(fields, field)!r}"
    if fields.noise_fn is not None:
        yield f"{name}.numerics.noise_fn (stochastic rounding)"


def _problems_of_calibration(quantizer: Any, name: str, *, of_weights: bool) -> Iterator[str]:
    if _is_float(quantizer):
        return
    kind, options = _calibration(quantizer)
    known: set[Any] = {aqt_calibration.AbsMaxCalibration}
    if of_weights:
        known.add(aqt_calibration.SnrBasedAutoCalibration)
    if kind not in known:
        yield f"{name}.calibration of type {getattr(kind, '__name__', kind)}"
        return
    neutral: dict[str, tuple[Any, ...]] = {
        "clipping_scale": (None, 1.0),
        "po2_scale": (False,),
        "dtype": (None, np.float32, np.dtype(np.float32)),
    }
    for option, value in options.items():
        if option in neutral and value not in neutral[option]:
            yield f"{name}.calibration.{option}={value!r}"
    scale_dtype = quantizer.scale_dtype
    if scale_dtype not in neutral["dtype"]:
        yield f"{name}.scale_dtype={scale_dtype!r}"
    axes = quantizer.calib_shared_axes
    if axes is None or (of_weights and axes == "per_tensor"):
        return
    # AQT's convolutions (Flax's layout): all axes but the batch, or but the output channels.
    first = 0 if of_weights else 1
    if axes == "per_tensor" or list(axes) != list(range(first, first + len(axes))) or not axes:
        yield f"{name}.calib_shared_axes={axes!r}"


def _calibration(quantizer: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class of a quantizer's calibration, and the options bound to it."""
    kind: Any = quantizer.calibration
    options: dict[str, Any] = {}
    while isinstance(kind, functools.partial):
        options = {**kind.keywords, **options}
        kind = cast("Any", kind.func)
    return kind, options


def _is_float(quantizer: Any) -> bool:
    return isinstance(quantizer.numerics, no_numerics.NoNumerics)


def _bits(quantizer: Any) -> int | None:
    return getattr(quantizer.numerics, "bits", None)


def _searches(quantizer: Any) -> bool:
    return _calibration(quantizer)[0] is aqt_calibration.SnrBasedAutoCalibration
