"""AQT's configurations as recipes: what has the same meaning is taken, all else is named."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aqt.jax.v2 import aqt_conv_general, config
from aqt.jax.v2.numerics import utils as numerics

import jaxqat
from jaxqat.quant._aqt import AqtWarning, from_aqt

ROWS = jax.random.normal(jax.random.key(0), (16, 24))
DYNAMIC = jaxqat.Recipe.preset("int8_dynamic")


def forward(bits: int = 8, *, keeps_largest: bool = False, **options: Any) -> Any:
    """A configuration with float gradients."""
    made: Any = config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None, **options)
    for side in (made.fwd.dg_quantizer.lhs, made.fwd.dg_quantizer.rhs):
        side.numerics = numerics.get_numerics(bits, preserve_max_val=keeps_largest)
    return made


def test_config_v4_is_int8_dynamic_with_a_warning_that_names_both_differences():
    with pytest.warns(AqtWarning) as warnings:
        recipe = from_aqt(config.config_v4(dlhs_bits=None))
    assert recipe == DYNAMIC
    (warning,) = warnings
    text = str(warning.message)
    assert "activations are dynamic, with one scale per example" in text
    assert "divided by 127, not by 127.5" in text
    assert warning.filename == __file__


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bits_are_those_of_the_configuration(bits):
    with pytest.warns(AqtWarning, match="one scale per example.*convert") as warnings:
        recipe = from_aqt(forward(bits, keeps_largest=True))
    assert "not by" not in str(warnings[0].message)
    assert (recipe.weight_bits, recipe.act_bits) == (bits, bits)


def test_a_configuration_without_numerics_leaves_layers_in_float(recwarn):
    recipe = from_aqt(config.default_unquantized_config())
    assert (recipe.weight_bits, recipe.act_bits) == (None, None)
    assert not recwarn.list


def test_a_configuration_of_a_convolution_and_one_of_version_3_are_taken():
    with pytest.warns(AqtWarning):
        assert from_aqt(aqt_conv_general.conv_general_dilated_make(2, 8, 8)) == DYNAMIC
    with pytest.warns(AqtWarning):
        assert from_aqt(config.config_v3(dlhs_bits=None, dlhs_accumulator_dtype=None)) == DYNAMIC


def test_calibration_and_granularity_of_weights_are_taken():
    made = forward()
    config.set_auto_calib_scale(made, (0.5, 1.0))
    made.fwd.dg_quantizer.rhs.calib_shared_axes = "per_tensor"
    with pytest.warns(AqtWarning, match="the search for weight scales tries 20 fractions"):
        recipe = from_aqt(made)
    assert (recipe.weight_range, recipe.weight_granularity) == ("snr", "per_tensor")


def changed(change):
    made = forward()
    change(made)
    return made


def of_weights(name, value):
    return changed(lambda made: setattr(made.fwd.dg_quantizer.rhs.numerics, name, value))


UNMAPPED = {
    r"dlhs with quantized gradients \(8 and 8 bits.*dlhs_bits=None": config.config_v4(),
    r"dlhs with .*; drhs with quantized gradients": config.fully_quantized(),
    r"fwd\.dg_quantizer\.lhs\.calibration\.clipping_scale=0\.5; fwd\.dg_quantizer\.rhs\.cal": (
        changed(lambda made: config.set_absmax_calib_scale(made, 0.5))
    ),
    r"rhs\.calibration of type ConstantCalibration": (
        changed(lambda made: config.set_constant_calibration(made, 2.0))
    ),
    r"lhs\.numerics of type Fp8Numerics": config.config_fwd_fp8(),
    r"fwd\.dg_quantizer\.lhs_mid_alpha=0\.5": forward(fwd_mid_alpha_both=0.5),
    r"fwd\.lhs\.dequant_mode=THIS_INPUT": changed(
        lambda made: config.set_fwd_dequant_mode(
            made, lhs_dequant_mode=config.DequantMode.THIS_INPUT
        )
    ),
    r"fwd\.rhs\.calibration_mode=REMAINING_AXIS": changed(
        lambda made: config.set_fwd_calibration_mode(
            made, rhs_calibration_mode=config.CalibrationMode.REMAINING_AXIS
        )
    ),
    r"fwd\.local_aqt=.*per_group": changed(
        lambda made: setattr(made.fwd, "local_aqt", config.LocalAqt())
    ),
    r"rhs\.numerics\.preserve_zero=False": of_weights("preserve_zero", False),
    r"rhs\.numerics\.round=False": of_weights("round", False),
    r"rhs\.numerics\.bits=9 \(2 to 8\)": of_weights("bits", 9),
    r"rhs\.numerics\.noise_fn \(stochastic": of_weights("noise_fn", lambda shape, key: 0),
    r"lhs\.calib_shared_axes='per_tensor'": changed(
        lambda made: setattr(made.fwd.dg_quantizer.lhs, "calib_shared_axes", "per_tensor")
    ),
    r"rhs\.scale_dtype": changed(
        lambda made: setattr(made.fwd.dg_quantizer.rhs, "scale_dtype", jnp.bfloat16)
    ),
    r"numerics of one side only \(fwd\.dg_quantizer\.lhs: None bits.*rhs: 8": changed(
        lambda made: setattr(made.fwd.dg_quantizer.lhs, "numerics", numerics.get_numerics(None))
    ),
}


@pytest.mark.parametrize("match", UNMAPPED)
def test_a_field_without_an_equivalent_is_refused_by_its_name(match):
    with pytest.raises(jaxqat.RecipeError, match=match):
        from_aqt(UNMAPPED[match])


def test_what_is_no_configuration_is_refused():
    with pytest.raises(jaxqat.RecipeError, match=r"takes AQT's DotGeneral .*, got str"):
        from_aqt("int8")


def test_quantize_takes_a_configuration_in_place_of_a_recipe():
    dense = nn.Dense(7)
    variables = dense.init(jax.random.key(1), ROWS)
    with pytest.warns(AqtWarning):
        model = jaxqat.quantize(dense, config.config_v4(dlhs_bits=None))
    expected = jaxqat.quantize(dense, "int8_dynamic").apply(variables, ROWS)
    np.testing.assert_array_equal(model.apply(variables, ROWS), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_computes_what_aqt_itself_computes_with_the_configuration(bits):
    """The same codes; AQT multiplies the sum by two scales, and here their product does it."""
    made = forward(bits, keeps_largest=True)
    variables = nn.Dense(7).init(jax.random.key(1), ROWS)
    by_aqt: Any = nn.Dense(7, dot_general=made).apply(variables, ROWS)
    with pytest.warns(AqtWarning):
        model = jaxqat.quantize(nn.Dense(7), made)
    found = model.apply(variables, ROWS)
    # Two roundings each, of values up to the largest result.
    np.testing.assert_allclose(found, by_aqt, atol=4 * 2**-24 * float(jnp.abs(by_aqt).max()))
    exact: Any = nn.Dense(7).apply(variables, ROWS)
    assert not np.allclose(found, exact, atol=1e-4)
