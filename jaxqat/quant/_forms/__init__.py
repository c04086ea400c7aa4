"""The integer form of a value, and how operations carry it along.

The interpreter computes every tensor in floating point, as the model wrote it, and beside it,
where it can, a *form*: the tensor as an expression over codes and accumulators (`forms`,
`accumulators`). Quantizing a tensor asks its form for the value in units of the output's scale s,
rounded to integers:

    product, affine operations after it:  round((acc + b) * m), b = round(offset / scale) - z sum(k)
    a tensor that is codes already:       round((code - z) * m); uint8 inputs are codes too
    a residual addition:                  the sum of its terms, each on an int8 grid by itself
    a product of two quantized tensors:   round((code_1 - z_1) (code_2 - z_2) m)
    their dot product, as in attention:   round(sum((code_1 - z_1) (code_2 - z_2)) m)
    ReLU, clipping, pooling, reshaping:   the same operation on the rounded values
    a function of codes, such as swish:   round(f(s_in (code - z)) / s), looked up per code
    per-channel factors of codes:         as a product with weights of 1
    factors and terms by place:           round((256 (code - z) + b) * m)
    an input, scaled as in x / 255:       round(((x + shift) * factor + term) / s)

with m the ratio of the form's scale to s: the requantization of Jacob et al. 2018
(arXiv:1712.05877, section 2.2), with the bias added to the accumulator before the one
multiplication. No compiler can change a bit in this order by contracting a multiply-add. It is the
arithmetic of the deployed network, so training that runs it trains what will be served. Batch norm
with batch statistics has no such form (its coefficients depend on the batch): there the float value
is rounded, and additions still work as above.

`primitives` is the one table of what the quantizer knows about each JAX primitive; its entries
derive the form of a result from the forms of the operands (`rules`).
"""

from jaxqat.quant._forms.accumulators import (
    Accumulator,
    Coefficients,
    Multiplied,
    Paired,
    Summed,
)
from jaxqat.quant._forms.exact import quotient, uncontracted
from jaxqat.quant._forms.forms import (
    Clamp,
    Codes,
    Either,
    Form,
    Joined,
    Moved,
    Operation,
    Pixels,
    Real,
    Scaled,
    Sum,
    Times,
)
from jaxqat.quant._forms.operand import Made, Operand
from jaxqat.quant._forms.tables import Tabulated, real_parts

__all__ = [
    "Accumulator",
    "Clamp",
    "Codes",
    "Coefficients",
    "Either",
    "Form",
    "Joined",
    "Made",
    "Moved",
    "Multiplied",
    "Operand",
    "Operation",
    "Paired",
    "Pixels",
    "Real",
    "Scaled",
    "Sum",
    "Summed",
    "Tabulated",
    "Times",
    "quotient",
    "real_parts",
    "uncontracted",
]
