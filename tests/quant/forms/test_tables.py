"""Functions of codes: one table for each, the same bits in every program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxqat.quant import _forms as forms
from jaxqat.quant._forms.derive import form_of
from jaxqat.quant._forms.tables import CODES
from jaxqat.quant._numerics.grids import Grid
from jaxqat.quant._trace.program import Program

UNITS = np.random.default_rng(0).integers(-128, 128, (3, 5, 4))


SUMMED: Any = None  # What was summed is of no matter here.


def grid(scale=0.0437, zero=11):
    scale = jnp.float32(scale)
    return Grid(scale, 1 / scale, jnp.int32(zero), -128, 127)


def codes(on=None):
    form = forms.Codes(jnp.asarray(UNITS, jnp.int8), on or grid(), ("x",))
    real = (form.codes.astype(jnp.float32) - form.grid.zero) * form.grid.scale
    return forms.Operand(real, form, False)


def derived(function, *operands, tables=True):
    """The form of a function's result, derived operation by operation."""
    program = Program(jax.make_jaxpr(function)(*(o.values for o in operands)))
    known = dict(zip(program.inputs, operands, strict=True))
    known |= {n: forms.Operand(value, None, True) for n, value in program.constants.items()}

    def read(atom):
        return known[atom] if isinstance(atom, int) else forms.Operand(atom.value, None, True)

    for node in program.nodes:
        reads = [read(a) for a in node.inputs]
        results = node.bind(*(o.values for o in reads))
        form = form_of(node, reads, results[0], tables=tables)
        constant = all(o.constant for o in reads)
        made = forms.Made(node, 0, lambda reads=reads: reads)
        known[node.outputs[0]] = forms.Operand(results[0], form, constant, made=made)
    return read(program.outputs[0])


FUNCTIONS = {
    "swish": jax.nn.swish,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "hard swish": jax.nn.hard_swish,
    "polynomial": lambda x: x**3 * 0.1 + x * x * 0.3 - x / 3.0,
    "sigmoid by hand": lambda x: 1 / (1 + jnp.exp(-1.702 * x)),
    "where": lambda x: jnp.where((x > 0) & (x < 2), x, jnp.sin(x)),
    "clipped": lambda x: jnp.minimum(jnp.maximum(jnp.tanh(x), -0.5), 0.75) * 2,
    "bfloat16": lambda x: jnp.tanh(x.astype(jnp.bfloat16)).astype(jnp.float32),
    "rows": lambda x: jnp.tanh(x[:, 1:3].transpose(0, 2, 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_table_has_the_function_s_units_at_every_element(name):
    result = derived(FUNCTIONS[name], codes())
    assert isinstance(result.form, forms.Tabulated)
    out = grid(0.02, -5)
    with jax.enable_x64(True):
        real = (jnp.asarray(UNITS, jnp.float64) - 11) * np.float64(np.float32(0.0437))
        wanted = np.asarray(FUNCTIONS[name](real), np.float64) / np.float64(np.float32(0.02))
    # bfloat16 is computed in float32; elsewhere a unit has an error far below 2**-8.
    error = 2 if name == "bfloat16" else 0.5 + 2**-8
    found = np.asarray(result.form.in_units(out))
    assert result.values is not None and found.shape == result.values.shape
    assert np.abs(found - wanted).max() <= error
    np.testing.assert_array_equal(found, np.round(found))


@pytest.mark.parametrize("scale", [0.0437, 1e-3, 0.9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_program_has_the_same_table(name, scale):
    """Compiled or not, with the scales as arguments or as constants, alone or before a gather."""

    def tables(scale, out):
        form = derived(FUNCTIONS[name], codes(grid(scale))).form
        assert isinstance(form, forms.Tabulated)
        return form.units(grid(out)), form.in_units(grid(out))

    def alone(scale, out):
        return tables(scale, out)[0]

    table, looked_up = jax.jit(tables)(scale, 0.013)
    np.testing.assert_array_equal(alone(scale, 0.013), table)
    np.testing.assert_array_equal(jax.jit(lambda: alone(scale, 0.013))(), table)
    np.testing.assert_array_equal(jax.jit(alone)(scale, 0.013), table)
    if name != "rows":
        np.testing.assert_array_equal(looked_up, np.asarray(table)[UNITS + 128])


def test_a_table_s_codes_stay_on_the_grid():
    form = derived(lambda x: x * x * x, codes()).form
    assert isinstance(form, forms.Tabulated)
    found = form.table(grid(0.01, 100))
    assert found.dtype == jnp.int8 and (found[0], found[-1]) == (-128, 127)
    assert found[int(CODES[139]) + 128] == 100  # Of the real zero.


def test_a_function_of_two_tensors_is_no_table():
    one, two = codes(), codes(grid(0.1))
    assert not isinstance(derived(lambda x, y: jnp.tanh(x) * y, one, two).form, forms.Tabulated)


def test_a_residual_addition_of_a_tensor_to_itself_is_a_sum():
    assert isinstance(derived(lambda x: x + x, codes()).form, forms.Sum)


SLOPES = np.linspace(-0.5, 0.4, 4, dtype=np.float32)
BY_CHANNEL = {
    "slopes": lambda x, slopes: jnp.where(x > 0, x, x * slopes),
    "slopes of rank 3": lambda x, slopes: jnp.where(x > 0, x, slopes.reshape(1, 1, 4) * x),
    "factors in a function": lambda x, slopes: jnp.tanh(x * slopes + 2 * slopes),
    "a call": lambda x, slopes: jax.jit(lambda x, s: jnp.where(x > 0, x, x * s))(x, slopes),
    "terms behind": lambda x, slopes: jnp.tanh(x) - slopes,
}


@pytest.mark.parametrize("name", BY_CHANNEL)
def test_channels_have_tables_of_their_own(name):
    function = BY_CHANNEL[name]
    form = derived(lambda x: function(x, SLOPES), codes()).form
    assert isinstance(form, forms.Tabulated)
    out = grid(0.02, -5)
    assert form.table(out).shape == (256, 4)
    with jax.enable_x64(True):
        real = (jnp.asarray(UNITS, jnp.float64) - 11) * np.float64(np.float32(0.0437))
        wanted = np.asarray(function(real, SLOPES.astype(np.float64))) / np.float64(
            np.float32(0.02)
        )
    assert np.abs(np.asarray(form.in_units(out)) - wanted).max() <= 0.5 + 2**-8


@pytest.mark.parametrize("name", BY_CHANNEL)
def test_every_program_has_the_same_tables_of_channels(name):
    def units():
        form = derived(lambda x: BY_CHANNEL[name](x, SLOPES), codes()).form
        assert isinstance(form, forms.Tabulated)
        return form.units(grid(0.02, -5))

    np.testing.assert_array_equal(jax.jit(units)(), units())


def test_factors_by_row_are_no_table():
    slopes = jnp.linspace(0.1, 0.4, 5).reshape(1, 5, 1)
    assert derived(lambda x: jnp.where(x > 0, x, x * slopes), codes()).form is None
    assert derived(lambda x: jnp.sin(x[:, 0, 0] * jnp.arange(3.0)), codes()).form is None


def test_a_function_in_training_has_no_form():
    """Its values follow the codes anyway, and a table would cost a look-up."""
    assert derived(jax.nn.swish, codes(), tables=False).form is None


def test_a_number_may_be_repeated_but_not_several():
    values = derived(lambda x: x + lax.broadcast(jnp.float32(2), x.shape), codes())
    assert isinstance(values.form, forms.Tabulated)
    several = derived(lambda x: jnp.tanh(x) + np.arange(5, dtype=np.float32)[:, None], codes())
    assert several.form is None


def test_a_number_that_repeats_a_tensor_leaves_no_table():
    form = derived(lambda x: x[:, :1] + jnp.zeros((1, 7, 1)), codes()).form
    assert not isinstance(form, forms.Tabulated)


def test_two_tensors_of_codes_are_multiplied_on_codes():
    one, two = codes(), codes(grid(0.1, -3))
    form = derived(lambda x, y: x * y, one, two).form
    assert isinstance(form, forms.Times)
    out = grid(0.7, 5)
    with np.errstate(all="raise"):
        factor = np.float32(np.float32(0.0437) * np.float32(0.1)) / np.float32(0.7)
        wanted = np.round(((UNITS - 11) * (UNITS + 3)).astype(np.float32) * factor)
    np.testing.assert_array_equal(form.in_units(out), wanted)


def test_factors_by_channel_of_codes_are_a_product_with_ones():
    slopes = np.array([0.5, -2, 0, 4], np.float32).reshape(1, 1, 4)
    offsets = np.array([1, 0, -1, 4], np.float32).reshape(1, 1, 4)
    form = derived(lambda x: x * slopes + offsets, codes(grid(0.5))).form
    assert isinstance(form, forms.Accumulator)
    wanted = ((UNITS - 11) * 0.5 * slopes + offsets) / 0.25  # Exact: powers of two.
    np.testing.assert_array_equal(form.in_units(grid(0.25)), wanted)


def test_a_mean_with_kept_axes_is_scaled_before_it_is_moved():
    form = derived(lambda x: jnp.mean(x, 1, keepdims=True), codes(grid(0.5))).form
    assert isinstance(form, forms.Moved)
    wanted = np.round((UNITS - 11).sum(1, keepdims=True).astype(np.float32) * np.float32(0.2))
    np.testing.assert_array_equal(form.in_units(grid(0.5)), wanted)


def test_an_axis_that_comes_and_goes_leaves_a_product_as_it_is():
    """`jax.vmap` reshapes what a convolution makes; a bias follows."""
    form = forms.Accumulator(
        jnp.asarray(UNITS, jnp.int32), jnp.int32(0), *map(jnp.float32, (0.5, 1, 0)), source=SUMMED
    )
    product = forms.Operand(jnp.asarray(UNITS * 0.5, jnp.float32), form, False)
    bias = np.array([1, 0.5, 0, -2], np.float32)
    found = derived(lambda x: lax.squeeze(x.reshape(3, 1, 5, 4), (1,)) + bias, product).form
    assert isinstance(found, forms.Accumulator)
    np.testing.assert_array_equal(found.in_units(grid(0.5)), UNITS + bias * 2)
    turned = derived(lambda x: x.reshape(3, 2, 10), product).form
    assert isinstance(turned, forms.Moved)
