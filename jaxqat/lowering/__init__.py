"""What compilers make of a function, for devices that need not be there: is it integer?"""

from jaxqat.lowering.kernels import (
    Kernel,
    float_activations,
    float_products,
    kernels,
    products,
    wide_activations,
)
from jaxqat.lowering.products import INTEGER_ENGINES, Product
from jaxqat.lowering.table import LoweringTable, lowering_table, print_lowering
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
    "Kernel",
    "LoweringError",
    "LoweringTable",
    "Product",
    "Target",
    "compile_for",
    "float_activations",
    "float_products",
    "is_available",
    "kernels",
    "lowering_table",
    "print_lowering",
    "products",
    "wide_activations",
]
