"""Lowering: the program that a device's compiler makes of a function, without the device.

`compile_for` compiles, `kernels` and `products` list what the program runs, and the table shows
whether the products are integer.
"""

from jaxqat.lowering.kernels import (
    Kernel,
    float_activations,
    float_products,
    kernels,
    products,
    wide_activations,
)
from jaxqat.lowering.products import INTEGER_ENGINES, CompiledProduct
from jaxqat.lowering.table import LoweringTable, lowering_table
from jaxqat.lowering.targets import (
    TARGETS,
    Compiled,
    LoweringError,
    Target,
    compile_for,
    is_available,
)

__all__ = [
    "INTEGER_ENGINES",
    "TARGETS",
    "Compiled",
    "CompiledProduct",
    "Kernel",
    "LoweringError",
    "LoweringTable",
    "Target",
    "compile_for",
    "float_activations",
    "float_products",
    "is_available",
    "kernels",
    "lowering_table",
    "products",
    "wide_activations",
]
