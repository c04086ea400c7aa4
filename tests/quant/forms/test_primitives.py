"""The table of primitives: its entries fit together, and each form is the operation on integers."""

import ast
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxqat.quant
from jaxqat.quant import _forms as forms
from jaxqat.quant._forms.primitives import PRIMITIVES, Kind
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._trace.program import INLINED, INLINED_FOR_PRODUCTS, PRODUCTS

SHAPE = (2, 6, 4)
UNITS = np.random.default_rng(0).integers(-60, 60, SHAPE)
OTHER = np.random.default_rng(1).integers(-60, 60, SHAPE)
PER_CHANNEL = np.array([3, -2, 0, 5]).reshape(1, 1, 4)
SCALE = np.float32(0.5)  # A power of two: real values and their quotients are exact.
WINDOW: dict[str, Any] = {
    "window_dimensions": (1, 2, 1),
    "window_strides": (1, 2, 1),
    "padding": ((0, 0), (0, 0), (0, 0)),
}
PADDING = ((0, 0, 0), (1, 2, 0), (0, 0, 0))


def grid(zero_point):
    return Grid(jnp.float32(SCALE), jnp.float32(1 / SCALE), jnp.int32(zero_point), -128, 127)


def codes(units, zero_point=7):
    """A tensor of these units as codes."""
    form = forms.Codes(jnp.asarray(units + zero_point, jnp.int8), grid(zero_point), ("x",))
    return forms.Operand(jnp.asarray(units * SCALE, jnp.float32), form, False)


def accumulator(units):
    """A tensor of these units as sums of products; 11 of each are the zero points' part."""
    nowhere: Any = None
    total = jnp.asarray(units - 11, jnp.int32)
    scales = jnp.float32(SCALE), jnp.float32(1), jnp.float32(0)
    form = forms.Accumulator(total, jnp.int32(11), *scales, nowhere)
    return forms.Operand(jnp.asarray(units * SCALE, jnp.float32), form, False)


def constant(values):
    return forms.Operand(jnp.asarray(values, jnp.float32), None, True)


def number(value):
    return forms.Operand(value, None, True)


def derived(name, bind, *operands, **params):
    """The form that the table derives for an operation."""
    rule = PRIMITIVES[name].form
    assert rule is not None
    shape = jax.eval_shape(bind, *(o.values for o in operands)).shape
    return rule(forms.Operation(name, params, bind), list(operands), shape)


def windows(reduce):
    return lambda units: reduce(units.reshape(2, 3, 2, 4), axis=2)


def identity(units):
    return units


# Operations on one tensor by primitive: in JAX, and in NumPy.
MOVES = {
    "convert_element_type": (lambda x: x.astype(jnp.bfloat16), identity),
    "copy": (jnp.copy, identity),
    "optimization_barrier": (lax.optimization_barrier, identity),
    "pvary": (identity, identity),  # Outside of a mapped axis it is nothing else.
    "broadcast_in_dim": (
        lambda x: lax.broadcast_in_dim(x, (2, 3, 6, 4), (0, 2, 3)),
        lambda u: np.broadcast_to(u[:, None], (2, 3, 6, 4)),
    ),
    "expand_dims": (lambda x: lax.expand_dims(x, (1,)), lambda u: u[:, None]),
    "reshape": (lambda x: lax.reshape(x, (2, 24)), lambda u: u.reshape(2, 24)),
    "rev": (lambda x: lax.rev(x, (1,)), lambda u: u[:, ::-1]),
    "slice": (
        lambda x: lax.slice(x, (0, 1, 0), (2, 6, 3), (1, 2, 1)),
        lambda u: u[:, 1:6:2, :3],
    ),
    "squeeze": (lambda x: lax.squeeze(x[:, :1], (1,)), lambda u: u[:, 0]),
    "transpose": (lambda x: lax.transpose(x, (0, 2, 1)), lambda u: u.transpose(0, 2, 1)),
    "reduce_window_max": (
        # With the smallest value of each type, as XLA's padding has it.
        lambda x: lax.reduce_window(x, _lowest(x.dtype), lax.max, **WINDOW),
        windows(np.max),
    ),
}
SUMS = {
    "reduce_sum": (lambda x: jnp.sum(x, axis=1), lambda u: u.sum(1)),
    "reduce_window_sum": (
        lambda x: lax.reduce_window(x, np.zeros((), x.dtype), lax.add, **WINDOW),
        windows(np.sum),
    ),
}
# Operations of a tensor (left) with one coefficient per channel.
AFFINE = {
    "add": (lax.add, lambda u: u + PER_CHANNEL, lambda u: PER_CHANNEL + u),
    "sub": (lax.sub, lambda u: u - PER_CHANNEL, lambda u: PER_CHANNEL - u),
    "mul": (lax.mul, lambda u: u * PER_CHANNEL, lambda u: PER_CHANNEL * u),
}
ALONE = {
    "pad",
    "concatenate",
    "max",
    "min",
    "neg",
    "div",
    "gather",
    "reduce_max",
}  # Each has a test of its own.


def _lowest(dtype):
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return np.asarray(info(dtype).min, dtype)


def assert_units(form, expected):
    """The form in units of the same scale is exactly these integers."""
    assert form is not None
    np.testing.assert_array_equal(form.in_units(grid(-3)), expected)


def test_every_form_of_the_table_is_tested_here():
    tested = {*MOVES, *SUMS, *AFFINE, *ALONE}
    assert tested == {name for name, primitive in PRIMITIVES.items() if primitive.form is not None}


@pytest.mark.parametrize("operand", [codes, accumulator])
@pytest.mark.parametrize("name", MOVES)
def test_moving_integers_is_moving_the_tensor(name, operand):
    bind, in_numpy = MOVES[name]
    assert_units(derived(name, bind, operand(UNITS)), in_numpy(UNITS))


@pytest.mark.parametrize("name", MOVES)
def test_moved_codes_are_codes_on_the_same_grid(name):
    bind, in_numpy = MOVES[name]
    form = derived(name, bind, codes(UNITS))
    assert isinstance(form, forms.Codes)
    np.testing.assert_array_equal(form.codes, in_numpy(UNITS) + 7)


@pytest.mark.parametrize("operand", [codes, accumulator])
def test_padding_adds_real_zeros(operand):
    def bind(x, fill):
        return lax.pad(x, fill, PADDING)

    form = derived("pad", bind, operand(UNITS), number(np.float32(0)))
    assert_units(form, np.pad(UNITS, [(0, 0), (1, 2), (0, 0)]))
    assert derived("pad", bind, operand(UNITS), number(np.float32(1))) is None


def gather(axes, sizes, mode="clip"):
    """A gather of whole slices at indices along axes, and its parameters."""
    others = tuple(axis for axis in range(3) if axis not in axes)
    params = {
        "dimension_numbers": lax.GatherDimensionNumbers(others, axes, axes),
        "slice_sizes": sizes,
        "mode": lax.GatherScatterMode.from_any(mode),
    }
    return (lambda x, indices: lax.gather(x, indices, **params)), params


def operation_of(form) -> forms.Operation:
    """The operation of a move."""
    if isinstance(form, forms.Codes):
        assert form.moved is not None
        return form.moved[0]
    assert isinstance(form, forms.Moved)
    return form.operation


@pytest.mark.parametrize("operand", [codes, accumulator])
@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
def test_elements_at_constant_indices_along_an_axis_are_taken(operand, mode):
    bind, params = gather((1,), (2, 1, 4), mode)
    where = forms.Operand(jnp.array([[5], [0], [0]]), None, True)
    form = derived("gather", bind, operand(UNITS), where, **params)
    assert_units(form, UNITS[:, [5, 0, 0]])
    move = operation_of(form)
    assert (move.name, move.params["axis"]) == ("take", 1)
    np.testing.assert_array_equal(move.params["indices"], [5, 0, 0])
    unknown = forms.Operand(where.values, None, False)  # Of the data.
    assert derived("gather", bind, operand(UNITS), unknown, **params) is None


def test_indices_beyond_the_end_are_clipped_where_the_operation_clips():
    bind, params = gather((1,), (2, 1, 4))
    where = forms.Operand(jnp.array([[9], [1]]), None, True)
    form = derived("gather", bind, codes(UNITS), where, **params)
    assert_units(form, UNITS[:, [5, 1]])
    np.testing.assert_array_equal(operation_of(form).params["indices"], [5, 1])


@pytest.mark.parametrize(("axes", "sizes"), [((1, 2), (2, 1, 1)), ((1,), (2, 1, 3))])
def test_other_gathers_have_no_form(axes, sizes):
    bind, params = gather(axes, sizes)
    where = forms.Operand(jnp.zeros((3, len(axes)), int), None, True)
    assert derived("gather", bind, codes(UNITS), where, **params) is None


@pytest.mark.parametrize("operand", [codes, accumulator])
def test_the_maximum_over_all_spatial_axes_is_picked(operand):
    form = derived("reduce_max", lambda x: x.max(1), operand(UNITS), axes=(1,))
    assert_units(form, UNITS.max(1))
    assert derived("reduce_max", lambda x: x.max(2), operand(UNITS), axes=(2,)) is None
    assert derived("reduce_max", lambda x: x.max((1, 2)), operand(UNITS), axes=(1, 2)) is None


def test_concatenation_rounds_each_part():
    def bind(*xs):
        return lax.concatenate(xs, 2)

    form = derived("concatenate", bind, codes(UNITS), accumulator(OTHER))
    assert_units(form, np.concatenate([UNITS, OTHER], 2))


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_codes_are_integer_sums(name):
    bind, in_numpy = SUMS[name]
    form = derived(name, bind, codes(UNITS))
    assert isinstance(form, forms.Accumulator)
    np.testing.assert_array_equal(form.total, in_numpy(UNITS))
    assert_units(form, in_numpy(UNITS))
    assert derived(name, bind, accumulator(UNITS)) is None  # It would have to be rounded before.


@pytest.mark.parametrize("name", AFFINE)
def test_coefficients_of_channels_join_the_accumulator(name):
    bind, from_left, from_right = AFFINE[name]
    coefficients = constant(PER_CHANNEL * (1 if name == "mul" else SCALE))
    assert_units(derived(name, bind, accumulator(UNITS), coefficients), from_left(UNITS))
    assert_units(derived(name, bind, coefficients, accumulator(UNITS)), from_right(UNITS))


def test_a_quotient_has_a_form_if_the_divisor_is_the_constant():
    divisor = constant(np.array([1, 0.5, -0.25, 2]).reshape(1, 1, 4))
    form = derived("div", lax.div, accumulator(2 * UNITS), divisor)
    assert_units(form, 2 * UNITS * np.array([1, 2, -4, 0.5]))
    assert derived("div", lax.div, divisor, accumulator(UNITS)) is None


def test_negation_turns_the_sign():
    assert_units(derived("neg", lax.neg, accumulator(UNITS)), -UNITS)


@pytest.mark.parametrize("name", AFFINE)
def test_coefficients_of_single_elements_have_no_form(name):
    coefficients = constant(np.ones(SHAPE))
    assert derived(name, AFFINE[name][0], accumulator(UNITS), coefficients) is None


def test_two_tensors_have_a_form_if_they_are_added_or_multiplied():
    assert derived("sub", lax.sub, codes(UNITS), codes(OTHER)) is None
    assert_units(derived("add", lax.add, codes(UNITS), codes(OTHER)), UNITS + OTHER)
    # Units of 0.5 times units of 0.5 are quarters.
    expected = np.round(UNITS * OTHER * np.float32(0.5))
    assert_units(derived("mul", lax.mul, codes(UNITS), codes(OTHER)), expected)


def test_terms_of_an_addition_that_are_not_quantized_are_added_in_float():
    form = derived("add", lax.add, codes(UNITS), accumulator(5 * OTHER))
    assert_units(form, UNITS + 5 * OTHER)
    # Their forms would round each of them: 0.3 + 0.3 units are one, and not none.
    values = jnp.full(SHAPE, 0.3 * SCALE, jnp.float32)
    term = forms.Operand(values, forms.Real(values), False)
    assert_units(derived("add", lax.add, term, term), np.ones(SHAPE, int))


@pytest.mark.parametrize("operand", [codes, accumulator])
@pytest.mark.parametrize(("name", "bind"), [("max", lax.max), ("min", lax.min)])
def test_clipping_clips_the_integers(name, bind, operand):
    in_numpy = {"max": np.maximum, "min": np.minimum}[name]
    for operands in ((operand(UNITS), number(np.float32(8))), (number(8.0), operand(UNITS))):
        assert_units(derived(name, bind, *operands), in_numpy(UNITS, 16))
    assert derived(name, bind, operand(UNITS), constant(np.zeros(SHAPE))) is None


def test_the_trace_and_the_table_agree_about_products_and_calls():
    assert {name for name, p in PRIMITIVES.items() if p.is_product} == PRODUCTS
    assert not PRIMITIVES.keys() & (INLINED | INLINED_FOR_PRODUCTS)  # They never become nodes.


@pytest.mark.parametrize("name", PRIMITIVES)
def test_the_facts_about_a_primitive_fit_together(name):
    primitive = PRIMITIVES[name]
    # Dropout's mask is random, so that nothing of it is in an integer network.
    if primitive.is_walked_through and primitive.kind is not Kind.SELECT:
        assert primitive.form is not None
    if primitive.keeps_values or primitive.picks_values:
        assert primitive.is_walked_through
    if primitive.may_be_statistic:
        assert primitive.kind in (Kind.SUM, Kind.REDUCE) and not primitive.is_pointwise
    if primitive.joins_branches or primitive.may_be_contracted:
        assert primitive.is_pointwise and primitive.kind is Kind.AFFINE


CORE = Path(jaxqat.quant.__file__).parent


@pytest.mark.parametrize("folder", ["_forms", "_plan", "_interpret"])
def test_no_other_file_tells_primitives_by_their_names(folder):
    for path in (CORE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith("name"):
                names = {
                    constant.value
                    for side in node.comparators
                    for constant in ast.walk(side)
                    if isinstance(constant, ast.Constant)
                }
                assert not names & PRIMITIVES.keys(), f"{path}: {ast.unparse(node)}"
