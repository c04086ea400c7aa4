"""Lowering: the program that a device's compiler makes of a function, without the device.

`compile_for` compiles, `kernels` and `products` list what the program runs, and the table shows
whether the products are integer.
"""

from jaxqat.lowering.kernels import Kernel, kernels, products
from jaxqat.lowering.products import CompiledProduct
from jaxqat.lowering.table import LoweringTable, lowering_table
from jaxqat.lowering.targets import TARGETS, Compiled, LoweringError, Target, compile_for

__all__ = [
    "TARGETS",
    "Compiled",
    "CompiledProduct",
    "Kernel",
    "LoweringError",
    "LoweringTable",
    "Target",
    "compile_for",
    "kernels",
    "lowering_table",
    "products",
]
