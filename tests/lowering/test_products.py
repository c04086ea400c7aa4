"""Which products count as integer products, on every target and in every form."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from lowering.assertions import INTEGER_ENGINES
from lowering.functions import CASES, F32, S8, S32, shape
from lowering.targets import GPUS, TPUS, for_targets, on_all

from jaxqat.lowering import compile_for, kernels, products

ENGINES = {
    "cpu": {"convolution": "YNNPACK", "dot": "YNNPACK"},
    "sm_75": {"convolution": "cuDNN", "dot": "cuBLAS"},
    "sm_80": {"convolution": "cuDNN", "dot": "Triton"},
    "sm_90": {"convolution": "cuDNN", "dot": "Triton"},
    "tpu_v5e": {"convolution": "MXU", "dot": "MXU"},
    "tpu_v6e": {"convolution": "MXU", "dot": "MXU"},
}


@on_all
@pytest.mark.parametrize("name", CASES)
def test_a_product_counts_once_and_as_integer_only_if_codes_are_multiplied(target, name):
    case = CASES[name]
    found = kernels(compile_for(target, case.function, *case.shapes).text)
    assert [product.kind for product in products(found)] == [case.kind]
    assert [product.is_integer for product in products(found)] == [case.is_integer]


@on_all
@pytest.mark.parametrize("name", ["s8_convolution", "s8_dot"])
def test_s8_operands_are_multiplied_by_an_8_bit_unit(target, name):
    case = CASES[name]
    (product,) = products(kernels(compile_for(target, case.function, *case.shapes).text))
    assert [operand.dtype for operand in product.operands] == ["s8", "s8"]
    assert product.sources == ("s8", "s8")
    assert product.engine == ENGINES[target.name][case.kind]
    assert product.engine in INTEGER_ENGINES


@on_all
def test_a_split_product_shows_its_widened_codes_and_is_a_loop_of_xla(target):
    # A matrix times one row becomes a multiplication and a sum, or a dot of s32 on the CPU.
    case = CASES["s8_dot_of_one_row"]
    (product,) = products(kernels(compile_for(target, case.function, *case.shapes).text))
    assert product.types == "s32(s8) x s32(s8) -> s32"
    assert product.engine == "XLA"


# Operands that pass through nested fusions, a fusion with two results, a call, padding, and
# conversions that widen, narrow or round.
MODULE = """\
%inner (a: s32[8,16], b: s32[16,4]) -> s32[8,4] {
  %a = s32[8,16]{1,0} parameter(0)
  %b = s32[16,4]{1,0} parameter(1)
  ROOT %product = s32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%outer (c: s16[4,16], d: s32[16,4]) -> s32[8,4] {
  %c = s16[4,16]{1,0} parameter(0)
  %none = s16[] constant(0)
  %padded = s16[8,16]{1,0} pad(%c, %none), padding=0_4x0_0
  %wide = s32[8,16]{1,0} convert(%padded)
  %d = s32[16,4]{1,0} parameter(1)
  ROOT %within = s32[8,4]{1,0} fusion(%wide, %d), kind=kLoop, calls=%inner
}

%widen_two (e: s8[4,16], f: TYPE[16,4]) -> (s16[4,16], s32[16,4]) {
  %e = s8[4,16]{1,0} parameter(0)
  %f = TYPE[16,4]{1,0} parameter(1)
  %e.1 = s16[4,16]{1,0} convert(%e)
  %f.1 = s32[16,4]{1,0} convert(%f)
  ROOT %both = (s16[4,16]{1,0}, s32[16,4]{1,0}) tuple(%e.1, %f.1)
}

%called (g: s8[4,16], h: TYPE[16,4]) -> s32[8,4] {
  %g = s8[4,16]{1,0} parameter(0)
  %h = TYPE[16,4]{1,0} parameter(1)
  %two = (s16[4,16]{1,0}, s32[16,4]{1,0}) fusion(%g, %h), kind=kLoop, calls=%widen_two
  %left = s16[4,16]{1,0} get-tuple-element(%two), index=0
  %right = s32[16,4]{1,0} get-tuple-element(%two), index=1
  ROOT %sum = s32[8,4]{1,0} fusion(%left, %right), kind=kLoop, calls=%outer
}

ENTRY %main (x: s8[4,16], w: s8[16,4]) -> s32[8,4] {
  %x = s8[4,16]{1,0} parameter(0)
  %w = s8[16,4]{1,0} parameter(1)
  %w.1 = TYPE[16,4]{1,0} convert(%w)
  ROOT %result = s32[8,4]{1,0} call(%x, %w.1), to_apply=%called
}
"""


@pytest.mark.parametrize(
    ("dtype", "types", "is_integer"),
    [
        ("s8", "s32(s8) x s32(s8) -> s32", True),
        ("s16", "s32(s8) x s32(s8) -> s32", True),
        # An s32 converted from a float is a rounded value, even if the float held codes.
        ("f32", "s32(s8) x s32 -> s32", False),
        # So is an s32 converted from a wider type.
        ("s64", "s32(s8) x s32 -> s32", False),
        # Unsigned codes are codes.
        ("u8", "s32(s8) x s32(u8) -> s32", True),
    ],
)
def test_operands_are_traced_to_their_codes_but_not_through_roundings(dtype, types, is_integer):
    (product,) = products(kernels(MODULE.replace("TYPE", dtype)))
    assert (product.types, product.is_integer) == (types, is_integer)


@for_targets(TPUS)
def test_a_tpu_convolves_converted_codes_as_codes_but_sums_floats(target):
    case = CASES["codes_convolved_in_bfloat16"]
    (product,) = products(kernels(compile_for(target, case.function, *case.shapes).text))
    assert product.types == "s8 x s8 -> f32"
    assert not product.is_integer


def pallas_dot(x, w, *, name, dtype):
    """Multiply a block of rows by a matrix, both converted to `dtype` first."""

    def kernel(x_ref, w_ref, out_ref):
        left, right = x_ref[...].astype(dtype), w_ref[...].astype(dtype)
        total = dot_accumulated(left, right, S32 if dtype == S8 else F32)
        out_ref[...] = jnp.clip(total.astype(F32) * 0.01, -127, 127).astype(S8)

    rows, inner = x.shape
    return pl.pallas_call(
        kernel,
        grid=(rows // 64,),
        in_specs=[
            pl.BlockSpec((64, inner), lambda i: (i, 0)),
            pl.BlockSpec(w.shape, lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((64, w.shape[1]), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, w.shape[1]), S8),
        compiler_params=pallas_triton.CompilerParams(num_warps=4, num_stages=1),
        name=name,
    )(x, w)


def dot_accumulated(left, right, dtype):
    return lax.dot_general(left, right, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


@for_targets(("sm_80", "sm_90"))
@pytest.mark.parametrize("dtype", [S8, jnp.bfloat16], ids=["s8", "bf16"])
def test_a_pallas_kernel_is_judged_by_the_dots_in_its_program(target, dtype):
    def function(x, w):
        with jax.named_scope("stage1/conv1"):
            return pallas_dot(x, w, name="my_conv", dtype=dtype)

    found = kernels(compile_for(target, function, shape(256, 64), shape(64, 64)).text)
    (kernel,) = (kernel for kernel in found if kernel.products)
    (product,) = kernel.products
    assert (kernel.name, kernel.what, kernel.layer) == ("my_conv", "convolution", "stage1/conv1")
    assert product.engine == "Pallas"
    assert product.is_integer == (dtype == S8)
    expected = "s8 x s8 -> s32" if dtype == S8 else "bf16 x bf16 -> f32"
    assert product.types == expected


@for_targets(GPUS)
def test_scratch_space_of_a_library_does_not_count_as_written(target):
    case = CASES["s8_convolution"]
    found = kernels(compile_for(target, case.function, *case.shapes).text)
    (kernel,) = (kernel for kernel in found if kernel.products)
    assert [str(written) for written in kernel.writes] == ["f32[8,16,16,64]"]
