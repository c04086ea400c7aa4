# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false
"""Models that inject AQT themselves: their products are quantized here, as AQT was told to.

A layer such as `nn.Dense(dot_general_cls=lambda: AqtDotGeneral(cfg))` multiplies by AQT's own
injection. While such a model is traced, the product is JAX's, and the configuration becomes a rule
for the layer's path (`quant._aqt.from_aqt`).
"""

import contextlib
import contextvars
import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Generator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxqat.errors import QuantizationError, RecipeError
from jaxqat.quant._aqt import AqtWarning, from_aqt, is_configuration
from jaxqat.quant.recipe import SETTINGS, Recipe, Rule

# Attributes of Flax's layers that hold the function that multiplies, and JAX's.
_PRODUCTS = {
    "dot_general": jax.lax.dot_general,
    "conv_general_dilated": jax.lax.conv_general_dilated,
}

Configurations = dict[str, list[Any]]  # AQT's, by path of the layer.

_FOUND: contextvars.ContextVar[Configurations | None] = contextvars.ContextVar(
    "found", default=None
)


class QuantizedProduct:
    """What multiplies integers within a single layer (`injected`)."""


@contextlib.contextmanager
def collected() -> Generator[Configurations]:
    """Collect the configurations of a model traced inside the block, by path of the layer."""
    found: Configurations = {}
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def with_rules(recipe: Recipe, found: Configurations) -> Recipe:
    """Return a recipe with a rule for each layer that has a configuration of AQT's.

    The recipe's own rules come first.

    Raises:
        RecipeError: A configuration has fields without an equivalent, or two of one path differ;
            it names the path.

    Warns:
        AqtWarning: The layers are quantized; it names each difference.
    """
    rules: list[Rule] = []
    for path, configurations in found.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                recipes = [from_aqt(configuration) for configuration in configurations]
            except RecipeError as error:
                raise RecipeError(f"{path or 'The model'}: {error}") from None
        if len(set(recipes)) > 1:
            raise RecipeError(
                f"{path or 'The model'} multiplies by two different AQT configurations, and rules "
                "are by path: put the layers into modules of their own."
            )
        for text in dict.fromkeys(str(warning.message) for warning in told):
            warnings.warn(f"{path or 'The model'}: {text}", AqtWarning, stacklevel=2)
        fields = {name: getattr(recipes[0], name) for name in SETTINGS}
        # A layer at the top is named by its parameter.
        rules.append(Rule(path=re.escape(path) if path else "[^/]*", **fields))
    return dataclasses.replace(recipe, rules=(*recipe.rules, *rules))


def linen_products() -> contextlib.AbstractContextManager[None]:
    """Let Linen modules that inject AQT multiply by JAX's operations inside the block."""
    return nn.intercept_methods(_intercept)


def _intercept(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
) -> Any:
    module = context.module
    if isinstance(module, QuantizedProduct):
        raise _quantized_already("/".join(context.module.path[:-1]))
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    # Importing it takes time; a model that has its layers has imported it.
    aqt_flax: Any = sys.modules.get("aqt.jax.v2.flax.aqt_flax")
    if aqt_flax is not None:
        products = {
            aqt_flax.AqtDotGeneral: jax.lax.dot_general,
            aqt_flax.AqtConvGeneralDilated: jax.lax.conv_general_dilated,
            aqt_flax.AqtEinsum: jnp.einsum,
        }
        for kind, product in products.items():
            if isinstance(module, kind):
                _note(module)
                return product(*args, **kwargs)
    with _replaced(module, "/".join(module.path)):
        return call(*args, **kwargs)


def nnx_products(module: Any) -> None:
    """Let an NNX module whose layers multiply by AQT's configurations use JAX's operations."""
    from flax import nnx

    for path, part in nnx.iter_modules(module):
        if isinstance(part, QuantizedProduct):
            raise _quantized_already("/".join(map(str, path[:-1])))
        for name, product in _injected(part):
            _collect("/".join(map(str, path)), getattr(part, name))
            setattr(part, name, product)


@contextlib.contextmanager
def _replaced(module: Any, path: str) -> Generator[None]:
    """Replace configurations that a Linen module has as products, inside the block."""
    before = {name: getattr(module, name) for name, _ in _injected(module)}
    for name, product in _injected(module):
        _collect(path, before[name])
        object.__setattr__(module, name, product)  # Linen's modules are frozen.
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _injected(module: Any) -> list[tuple[str, Any]]:
    """Return the attributes that hold a configuration of AQT's, with JAX's product for each."""
    return [
        (name, product)
        for name, product in _PRODUCTS.items()
        if is_configuration(getattr(module, name, None))
    ]


def _quantized_already(path: str) -> QuantizationError:
    return QuantizationError(
        f"{path or 'The model'} is quantized already: it multiplies by what `jaxqat.aqt` injected. "
        "Pass the model without it; its variables fit."
    )


def _note(module: Any) -> None:
    """Note the configuration of a module of AQT's."""
    parent = module.parent
    path = "/".join(parent.path if isinstance(parent, nn.Module) else ())
    modes = {str(getattr(module, f"{side}_quant_mode").name) for side in ("lhs", "rhs")}
    if not modes <= {"TRAIN", "CALIBRATE"}:
        raise QuantizationError(
            f"{path or 'The model'} is in AQT's mode {', '.join(sorted(modes))}, in which its "
            "weights are AQT's codes. Quantize the model in QuantMode.TRAIN, with its parameters."
        )
    if (
        getattr(module, "tiling_fn", None) is not None
        or getattr(module, "tiling_cfg", None) is not None
    ):
        raise QuantizationError(
            f"{path or 'The model'} multiplies by AQT in tiles, which have scales of their own. "
            "Leave out the tiling, or use Recipe(weight_granularity='per_group')."
        )
    if module.cfg is not None:
        _collect(path, module.cfg)


def _collect(path: str, configuration: Any) -> None:
    found = _FOUND.get()
    if found is not None:
        found.setdefault(path, []).append(configuration)
