# pyright: strict
"""`jaxqat.aqt`: AQT's configurations to recipes and back, and injection into layers by hand.

recipe = jaxqat.aqt.from_aqt(configuration)
configuration = jaxqat.aqt.to_aqt("int8_dynamic")
layer = nn.Dense(10, dot_general_cls=jaxqat.aqt.dot_general_cls("int8"))
"""

from typing import TYPE_CHECKING, Any

from jaxqat.quant._aqt import AqtConfiguration, AqtWarning, from_aqt, to_aqt
from jaxqat.quant._models.injected import conv_general_dilated_cls, dot_general_cls

if TYPE_CHECKING:
    from jaxqat.quant._models.injected_nnx import NNXConvGeneralDilated, NNXDotGeneral

# Loaded at first use: importing flax.nnx imports optax.
_LAZY = ("NNXConvGeneralDilated", "NNXDotGeneral")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from jaxqat.quant._models import injected_nnx

        globals().update({each: getattr(injected_nnx, each) for each in _LAZY})
        return globals()[name]
    raise AttributeError(f"module 'jaxqat.aqt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AqtConfiguration",
    "AqtWarning",
    "NNXConvGeneralDilated",
    "NNXDotGeneral",
    "conv_general_dilated_cls",
    "dot_general_cls",
    "from_aqt",
    "to_aqt",
]
