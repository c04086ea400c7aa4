"""The one table of what the quantizer knows about JAX primitives.

The planner asks the table where a search may walk back through an operation, and the interpreter
which integer form a result has. A primitive that is not in the table has no integer form, and no
search walks through it. To support an operation, add its entry here, and its form rule to `rules`.
"""

import dataclasses
import enum
from collections.abc import Callable

from jaxtyping import Array

from jaxqat.quant._forms import exact, rules
from jaxqat.quant._forms.rules import FormRule


class Kind(enum.Enum):
    """What an operation does with values."""

    CAST = "changes the type"
    COPY = "returns the same values"
    MOVE = "moves elements, or repeats or leaves out some"
    PAD = "puts a border around a tensor"
    PICK = "picks one element of each window"
    JOIN = "puts tensors side by side"
    AFFINE = "multiplies or adds, element by element"
    CLIP = "bounds each element"
    FUNCTION = "is another function of elements, such as an exponential"
    SELECT = "chooses each element from several tensors, as dropout does with a mask"
    SUM = "sums elements, as average pooling does"
    REDUCE = "reduces elements in another way"
    CALL = "calls a function that the trace keeps whole, as `jax.nn.relu` is"
    CONV = "is a convolution: a layer, if one side depends on parameters only"
    DOT = "is a dot product: a layer, if one side depends on parameters only"
    OTHER_PRODUCT = "multiplies tensors in a way that has no integer form here"
    LOOKUP = "picks rows of a table: an embedding, if that depends on parameters only"
    UNKNOWN = "is not in the table"


@dataclasses.dataclass(frozen=True)
class Primitive:
    """What the quantizer knows about one primitive.

    Attributes:
        kind: What it does with values.
        form: Derives the integer form of its result; None if it has none.
        may_be_statistic: Whether reducing over the batch with it makes a batch statistic.
        joins_branches: Whether two tensors that depend on the data meet in it as in a residual
            addition.
        may_be_contracted: Whether a compiler may fuse it with a later addition into one
            multiply-add.
        multiplies_branches: Whether two tensors that depend on the data can be multiplied in it
            element by element, as a tensor and its gate.
        repeats: Whether it can repeat elements.
        of_parameters: Computes it for float32 parameters with the same bits on every CPU,
            where XLA's own does not; None for all others.
    """

    kind: Kind
    form: FormRule | None = None
    may_be_statistic: bool = False
    joins_branches: bool = False
    may_be_contracted: bool = False
    multiplies_branches: bool = False
    repeats: bool = False
    of_parameters: Callable[[Array], Array] | None = None

    @property
    def is_pointwise(self) -> bool:
        """Whether it computes each element from that of its operands, in a way with a form."""
        return self.kind in (Kind.CAST, Kind.COPY, Kind.AFFINE, Kind.CLIP, Kind.SELECT)

    @property
    def is_elementwise(self) -> bool:
        """Whether it is pointwise, whatever the function: a table can hold it."""
        return self.is_pointwise or self.kind is Kind.FUNCTION

    @property
    def is_product(self) -> bool:
        """Whether it can be a layer that multiplies."""
        return self.kind in (Kind.CONV, Kind.DOT)

    @property
    def keeps_values(self) -> bool:
        """Whether its result holds the operand's values, moved, or zeros: both share codes."""
        return self.kind in (Kind.CAST, Kind.COPY, Kind.MOVE, Kind.PAD)

    @property
    def picks_values(self) -> bool:
        """Whether its result holds some of the operand's values: codes go through it."""
        return self.keeps_values or self.kind is Kind.PICK

    @property
    def is_walked_through(self) -> bool:
        """Whether the search for a residual addition or a pool walks back through it.

        A call is walked through if its body only clips; the planner looks inside.
        """
        return self.picks_values or self.is_pointwise


PRIMITIVES: dict[str, Primitive] = {
    "convert_element_type": Primitive(Kind.CAST, rules.same),
    "copy": Primitive(Kind.COPY, rules.same),
    "optimization_barrier": Primitive(Kind.COPY, rules.same),
    # `jax.shard_map` marks with it what is the same on all devices, such as a parameter.
    "pvary": Primitive(Kind.COPY, rules.same),
    "broadcast_in_dim": Primitive(Kind.MOVE, rules.reshaped, repeats=True),
    "expand_dims": Primitive(Kind.MOVE, rules.reshaped),
    "reshape": Primitive(Kind.MOVE, rules.reshaped),
    "rev": Primitive(Kind.MOVE, rules.moved),
    "slice": Primitive(Kind.MOVE, rules.moved),
    "squeeze": Primitive(Kind.MOVE, rules.reshaped),
    "transpose": Primitive(Kind.MOVE, rules.transposed),
    "pad": Primitive(Kind.PAD, rules.padded),
    "reduce_window_max": Primitive(Kind.PICK, rules.picked),
    "concatenate": Primitive(Kind.JOIN, rules.joined),
    "add": Primitive(Kind.AFFINE, rules.added, joins_branches=True),
    "sub": Primitive(Kind.AFFINE, rules.subtracted),
    "mul": Primitive(
        Kind.AFFINE, rules.multiplied, may_be_contracted=True, multiplies_branches=True
    ),
    "div": Primitive(Kind.AFFINE, rules.divided),
    "neg": Primitive(Kind.AFFINE, rules.negated),
    "max": Primitive(Kind.CLIP, rules.at_least),
    "min": Primitive(Kind.CLIP, rules.at_most),
    "select_n": Primitive(Kind.SELECT),
    **dict.fromkeys(
        (
            *("abs", "cbrt", "ceil", "cos", "cosh", "erf", "erf_inv", "erfc", "exp", "exp2"),
            *("expm1", "floor", "is_finite", "log", "log1p", "logistic", "not", "round"),
            *("sign", "sin", "sinh", "square", "tan", "tanh", "integer_pow"),
            *("acos", "acosh", "asin", "asinh", "atan", "atanh"),
            *("pow", "rem", "atan2", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
            "clamp",
        ),
        Primitive(Kind.FUNCTION),
    ),
    "rsqrt": Primitive(Kind.FUNCTION, of_parameters=exact.reciprocal_root),
    "sqrt": Primitive(Kind.FUNCTION, of_parameters=exact.root),
    "reduce_sum": Primitive(Kind.SUM, rules.summed, may_be_statistic=True),
    "reduce_window_sum": Primitive(Kind.SUM, rules.summed),
    "reduce_max": Primitive(Kind.REDUCE, rules.largest, may_be_statistic=True),
    "reduce_min": Primitive(Kind.REDUCE, may_be_statistic=True),
    "reduce_prod": Primitive(Kind.REDUCE, may_be_statistic=True),
    # Its form is that of its body (`derive.form_of`).
    "custom_jvp_call": Primitive(Kind.CALL),
    # The trace has to know these two as well (`program.PRODUCTS`): it inlines calls with them.
    "conv_general_dilated": Primitive(Kind.CONV),
    "dot_general": Primitive(Kind.DOT),
    "ragged_dot": Primitive(Kind.OTHER_PRODUCT),
    "ragged_dot_general": Primitive(Kind.OTHER_PRODUCT),
    "scaled_dot": Primitive(Kind.OTHER_PRODUCT),
    "scaled_matmul": Primitive(Kind.OTHER_PRODUCT),
    "gather": Primitive(Kind.LOOKUP, rules.taken),
}
_UNKNOWN = Primitive(Kind.UNKNOWN)


def primitive_of(name: str) -> Primitive:
    """Return the entry of the primitive of this name; an empty one if it has none."""
    return PRIMITIVES.get(name, _UNKNOWN)
