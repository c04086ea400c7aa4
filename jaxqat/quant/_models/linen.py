# pyright: strict, reportUnknownMemberType=false
"""Quantized Linen modules, with Linen's `init` and `apply`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList, unfreeze  # pyright: ignore[reportUnknownVariableType]
from flax.errors import ModifyScopeVariableError

from jaxqat.errors import QuantizationError
from jaxqat.quant._interpret import Memory
from jaxqat.quant._models.aqt_calls import linen_products
from jaxqat.quant._models.bound import BoundModel, PureFunction
from jaxqat.quant._models.stateless import Mutable, StatelessModel
from jaxqat.quant._numerics import cpu
from jaxqat.quant._plan.plan import LayerInfo
from jaxqat.quant._trace.arguments import split_arrays
from jaxqat.quant.recipe import Recipe

# Collections that change in `init`, as in Linen's.
_IN_INIT = DenyList("intermediates")
# Arguments of Linen's `tabulate` itself; it hands all others to the module.
_OF_TABLE = frozenset(
    {
        "depth",
        "show_repeated",
        "mutable",
        "console_kwargs",
        "table_kwargs",
        "column_kwargs",
        "compute_flops",
        "compute_vjp_flops",
    }
)


@dataclasses.dataclass(frozen=True)
class QuantizedModule(StatelessModel):
    """A Linen module whose convolutions and dense layers multiply integers.

    The variables are the module's own and two more collections: `quant`, the activation ranges,
    and `quant_params`, the learned step sizes if the recipe learns any. Ranges move when 'quant'
    is mutable, as batch norm's statistics do with 'batch_stats', and are frozen otherwise.

        model = jaxqat.quantize(ResNet(num_classes=10), "int8")
        variables = model.calibrate(variables, images, train=False)
        logits, updates = model.apply(
            variables, images, train=True, mutable=["batch_stats", "quant"]
        )

    Quantized modules of equal modules and equal recipes are equal, so a compiled function that
    takes one as a static argument is compiled once. `apply` and `init` take the arguments of
    Linen's: `method`, `rngs`, and `capture_intermediates` for the values between layers as the
    quantized evaluation computes them. Only `bind` is not Linen's.

    Attributes:
        module: The module as it was given.
        recipe: How it is quantized.
        memory: What training keeps for the backward pass (`jaxqat.quantize`).
    """

    module: nn.Module
    recipe: Recipe
    memory: Memory = "values"

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the module's variables, without ranges: `calibrate` adds them from data.

        The arguments are those of Linen's `init`.
        """
        mutable = kwargs.pop("mutable", _IN_INIT)
        variables = unfreeze(self.module.init(rngs, *args, mutable=mutable, **kwargs))
        # As in Linen's `init`, which may run in training mode, every collection may change.
        self._bound(variables, {"rngs": rngs, **kwargs}, mutable=True).checked_plan(args)
        return variables

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return the module's result on these inputs, and the variables of `init`.

        The result is the quantized one of a first training step, with ranges of this batch.
        """
        variables = self.init(rngs, *args, **kwargs)
        kwargs.pop("mutable", None)
        empty = self.init_quant(variables, *args, mutable=True, rngs=rngs, **kwargs)
        result, _ = self.apply(empty, *args, mutable=_IN_INIT, rngs=rngs, **kwargs)
        return result, variables

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """Return Linen's table of the module, and what each product is quantized to.

        The arguments are those of Linen's `tabulate`. Nothing is computed.
        """
        table = self.module.tabulate(rngs, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_TABLE}
        arrays, rebuild = split_arrays((rngs, args, kwargs))

        def initial(arrays: Any) -> Any:
            rngs, args, kwargs = rebuild(arrays)
            return self.init(rngs, *args, **kwargs)

        variables = jax.eval_shape(initial, arrays)
        bound = self._bound(variables, {"rngs": rngs, **kwargs}, mutable=True)
        return "\n".join([table, "Products:", *map(_line, bound.checked_plan(args).table), ""])

    def bind(self, *state: Any, **kwargs: Any) -> BoundModel:
        """Return the module with its variables and keyword arguments filled in.

        This is a function of inputs with frozen ranges (`BoundModel`), which `convert`, `verify`
        and `analyze` take. It is not Linen's bound module: the quantized computation is that of a
        whole call, so submodules cannot be called one by one.

        Args:
            *state: One argument, the variables.
            **kwargs: Keyword arguments of every call, such as `train=False`.
        """
        return super().bind(*state, **kwargs)

    def _function(self, mutable: Mutable) -> PureFunction:
        return _Apply(self.module, mutable)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """Linen's `apply` as a `PureFunction`; equal for equal modules."""

    module: nn.Module
    mutable: Mutable

    def __call__(
        self, params: Any, others: Mapping[str, Any], args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        variables = {"params": params, **others}
        try:
            with linen_products(), cpu.form(active=False):
                result = self.module.apply(variables, *args, mutable=self.mutable, **kwargs)
        except ModifyScopeVariableError as error:
            raise QuantizationError(
                "The module changes a variable in a call that may not change it: "
                f"{str(error).split(' (http')[0]} Call it as in inference (for batch norm, "
                "train=False or what its argument is called), or use `apply` with `mutable`, such "
                "as mutable=['batch_stats', 'quant'] in training."
            ) from error
        # Linen returns a pair for every `mutable` but False.
        return (result, {}) if self.mutable is False else result


def _line(info: LayerInfo) -> str:
    """Return a line about one product: its widths, or why it stays in float."""
    if info.float_reason is not None:
        return f"  {info.path} ({info.kind}): float, {info.float_reason}"
    inputs = "float" if info.act_bits is None else f"{info.act_bits} bits"
    return f"  {info.path} ({info.kind}): weights {info.weight_bits} bits, input {inputs}"
