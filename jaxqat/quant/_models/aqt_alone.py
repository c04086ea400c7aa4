# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportMissingTypeStubs=false, reportUnknownArgumentType=false
"""AQT by itself, for comparison: what its own injection makes of a Linen module."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
from aqt.jax.v2 import config as aqt_config


def dense_configuration() -> Any:
    """Return AQT's own configuration of a dense layer in 8 bits, with gradients in float."""
    return aqt_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)


class AqtAlone:
    """A Linen module whose convolutions and dense layers multiply by AQT.

    AQT is injected through the fields of the layers, `conv_general_dilated_cls` and
    `dot_general_cls`, while they are called; a model of one's own would pass them.
    """

    def __init__(self, module: nn.Module):
        from aqt.jax.v2.flax import aqt_flax  # Importing it takes time.

        dense = dense_configuration()
        convolution: Any = dataclasses.replace(
            dense, fwd=aqt_config.conv_general_dilated_make(2, lhs_bits=8, rhs_bits=8)
        )
        self._module = module
        # The configurations round to the nearest code, so no random key is needed.
        self._fields = {
            nn.Conv: (
                "conv_general_dilated_cls",
                functools.partial(aqt_flax.AqtConvGeneralDilated, convolution, prng_name=None),
            ),
            nn.Dense: (
                "dot_general_cls",
                functools.partial(aqt_flax.AqtDotGeneral, dense, prng_name=None),
            ),
        }

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Return the initial variables, as `nn.Module.init`."""
        with nn.intercept_methods(self._inject):
            return self._module.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, as `nn.Module.apply`."""
        with nn.intercept_methods(self._inject):
            return self._module.apply(*args, **kwargs)

    def _inject(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        for kind, (field, value) in self._fields.items():
            if isinstance(context.module, kind):
                object.__setattr__(context.module, field, value)  # Linen's modules are frozen.
        return call(*args, **kwargs)
