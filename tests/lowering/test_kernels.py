"""The bytes that kernels read and write, against counts by hand for small modules."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from lowering.assertions import float_activations, wide_activations
from lowering.functions import F32, shape
from lowering.targets import on_all

from jaxqat.lowering import compile_for, kernels, products
from jaxqat.lowering.hlo import Shape, parse
from jaxqat.lowering.kernels import layer_of

# The syntax of the three compilers: tuples with scratch space, tiled layouts in on-chip memory,
# asynchronous copies, nested fusions, updates in place, slices, loops.
MODULE = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(s8[4,8]{1,0})->f32[4,16]{1,0}}

FileNames
1 "a.py"

%quantize (p: f32[4,16]) -> s8[4,16] {
  %p = f32[4,16]{1,0} parameter(0)
  %bound = f32[] constant(127)
  %bounds = f32[4,16]{1,0} broadcast(%bound), dimensions={}
  %clipped = f32[4,16]{1,0} minimum(%p, %bounds)
  ROOT %codes = s8[4,16]{1,0} convert(%clipped)
}

%row (p.1: f32[100,16], at: s32[]) -> f32[1,16] {
  %p.1 = f32[100,16]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %taken = f32[1,16]{1,0} dynamic-slice(%p.1, %at, %zero), dynamic_slice_sizes={1,16}
}

%store (p.2: f32[100,16], p.3: f32[1,16], p.4: s32[]) -> f32[100,16] {
  %p.2 = f32[100,16]{1,0} parameter(0)
  %p.3 = f32[1,16]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %stored = f32[100,16]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %zero.1)
}

%body (state: (s32[], f32[100,16])) -> (s32[], f32[100,16]) {
  %state = (s32[], f32[100,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[100,16]{1,0} get-tuple-element(%state), index=1
  %one_row = f32[1,16]{1,0} fusion(%table, %i), kind=kLoop, calls=%row
  %table.1 = f32[100,16]{1,0} fusion(%table, %one_row, %i), kind=kLoop, calls=%store
  ROOT %next = (s32[], f32[100,16]{1,0}) tuple(%i, %table.1)
}

%condition (state.1: (s32[], f32[100,16])) -> pred[] {
  %state.1 = (s32[], f32[100,16]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: s8[4,8], w: s8[8,16], table.2: f32[100,16]) -> (f32[4,16], f32[100,16]) {
  %x = s8[4,8]{1,0:T(8,128)(4,1)} parameter(0), metadata={op_name="x"}
  %w = s8[8,16]{1,0} parameter(1)
  %table.2 = f32[100,16]{1,0} parameter(2)
  %copy-start = (s8[4,8]{1,0:T(8,128)(4,1)S(1)}, s8[4,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = s8[4,8]{1,0:T(8,128)(4,1)S(1)} copy-done(%copy-start)
  %call = (s32[4,16]{1,0}, s8[4096]{0}) custom-call(%copy-done, %w), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/Net/head/dot_general"}
  %sums = s32[4,16]{1,0} get-tuple-element(%call), index=0
  %real = f32[4,16]{1,0} convert(%sums)
  %codes.1 = s8[4,16]{1,0} fusion(%real), kind=kLoop, calls=%quantize
  %on_chip = f32[4,16]{1,0:T(8,128)S(1)} convert(%codes.1), \
backend_config={"window_config":{"estimated_cycles":"321"}}
  %result = f32[4,16]{1,0} copy(%on_chip)
  %start = s32[] constant(0)
  %loop = (s32[], f32[100,16]{1,0}) tuple(%start, %table.2)
  %while = (s32[], f32[100,16]{1,0}) while(%loop), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  %table.3 = f32[100,16]{1,0} get-tuple-element(%while), index=1
  ROOT %results = (f32[4,16]{1,0}, f32[100,16]{1,0}) tuple(%result, %table.3)
}
"""


@pytest.fixture(scope="module")
def found():
    return {kernel.name: kernel for kernel in kernels(MODULE)}


def test_every_instruction_that_computes_is_a_kernel_in_order(found):
    names = ["copy-start", "call", "real", "codes.1", "on_chip", "result", "one_row", "table.1"]
    assert list(found) == names
    whats = ["copy", "dot", "elementwise", "elementwise", "elementwise", "copy", "copy", "copy"]
    assert [kernel.what for kernel in found.values()] == whats


def test_bytes_are_those_of_main_memory(found):
    moved = {name: (kernel.bytes_read, kernel.bytes_written) for name, kernel in found.items()}
    assert moved == {
        "copy-start": (8 * 128, 0),  # To the chip; on a TPU, x is padded to a tile of 8 x 128.
        "call": (8 * 16, 4 * 4 * 16),  # One operand is on the chip; scratch space is no result.
        "real": (4 * 4 * 16, 4 * 4 * 16),
        "codes.1": (4 * 4 * 16, 4 * 16),
        "on_chip": (4 * 16, 0),
        "result": (0, 4 * 4 * 16),
        "one_row": (4 * 16 + 4, 4 * 16),  # One row of the table, and the index.
        "table.1": (4 * 16 + 4, 4 * 16),  # The new row and the index; the rest stays in place.
    }


def test_a_loops_body_runs_as_often_as_the_compiler_knows(found):
    times = {name: kernel.times for name, kernel in found.items() if kernel.times != 1}
    assert times == {"one_row": 7, "table.1": 7}


def test_cycles_and_layers_are_read_from_the_compilers_metadata(found):
    assert {n: k.cycles for n, k in found.items() if k.cycles is not None} == {"on_chip": 321}
    assert {n: k.layer for n, k in found.items() if k.layer} == {"call": "Net/head"}


def test_results_of_the_module_are_distinguished(found):
    assert {name for name, kernel in found.items() if kernel.outputs} == {"result"}


def test_activations_are_selected_by_size_and_type_without_results(found):
    def names(function, at_least):
        return [kernel.name for kernel, _ in function(found.values(), at_least=at_least)]

    # s8 'codes.1' is narrow, and 'result' is the module's.
    assert names(wide_activations, 64) == ["call", "real", "on_chip", "table.1"]
    assert names(float_activations, 64) == ["real", "on_chip", "table.1"]
    assert names(float_activations, 65) == ["table.1"]


def test_shapes_know_their_size():
    sizes = {("s8", (2, 3)): 6, ("s4", (3,)): 2, ("bf16", (5,)): 10, ("pred", (4,)): 4}
    sizes |= {("f8e4m3fn", (4,)): 4, ("c64", (2,)): 16, ("token", ()): 0, ("f32", ()): 4}
    assert {key: Shape(*key).bytes for key in sizes} == sizes
    codes = [t for t in ("s8", "u8", "s4", "s16", "s32", "f32", "bf16", "pred") if is_code(t)]
    assert codes == ["s8", "u8", "s4"]


@on_all
def test_bytes_in_memory_equal_the_compilers_with_padding_of_tiles(target):
    shapes = [shape(3, 5, 5, 24), shape(3, 3, 24, 64), shape(7, dtype=F32), shape(9, 70, dtype=F32)]
    shapes += [shape(33, 130), shape(6, 7, 9, dtype=jnp.bfloat16), shape(dtype=F32)]

    def function(*arrays):
        return sum(array.astype(F32).sum() for array in arrays)

    compiled = compile_for(target, function, *shapes)
    parameters = parse(compiled.text).entry.parameters.values()
    sizes = [shape.bytes for parameter in parameters for shape in parameter.shapes]
    assert compiled.argument_bytes == sum(sizes)


def is_code(dtype):
    return Shape(dtype, ()).is_code


@pytest.mark.parametrize(
    ("op_name", "layer"),
    [
        ("jit(step)/jvp(Net)/stage1/conv1/conv_general_dilated", "Net/stage1/conv1"),
        ("jit(step)/transpose(jvp(Net))/head/dot_general", "Net/head"),
        ("jit(step)/jvp(stage1/conv1)/conv_general_dilated", "stage1/conv1"),
        ("jit(step)/transpose(jvp(stage1/conv1/jit(relu)))/max", "stage1/conv1"),
        ("jit(f)/whiles/bodyguard/dot_general", "whiles/bodyguard"),
        ("jit(f)/while/body/closed_call/block/dot_general", "block"),
        ("jit(f)/jvp()/cond/branch_0_fun/conv_general_dilated", ""),
        ("jit(f)/dot_general", ""),
        ("x", ""),
        ("", ""),
    ],
)
def test_a_layer_is_the_modules_path_in_jaxs_name(op_name, layer):
    assert layer_of(op_name) == layer


def test_text_without_a_module_is_an_error():
    with pytest.raises(ValueError, match="no HLO module"):
        parse("HloModule nothing\n")


def test_a_line_that_is_not_an_instruction_is_an_error():
    with pytest.raises(ValueError, match="not an HLO instruction: 'what is this'"):
        parse(MODULE.replace("  %start = s32[] constant(0)", "  what is this"))


def test_constants_of_every_kind_are_parsed():
    def function(x):
        # Strings of braces, booleans, negative and non-finite numbers.
        matrix = jnp.asarray([[1.0, -2.0, jnp.inf], [0.5, jnp.nan, 3.0]])
        return x @ matrix, jnp.where(jnp.asarray([True, False, True]), 1, jnp.int32(-7))

    compiled = compile_for("cpu", function, shape(4, 2, dtype=F32))
    assert [product.kind for product in products(kernels(compiled.text))] == ["dot"]


def test_a_product_in_a_scan_counts_once_per_iteration():
    def function(x, weights):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    compiled = compile_for("cpu", function, shape(64, 64, dtype=F32), shape(5, 64, 64, dtype=F32))
    (kernel,) = (kernel for kernel in kernels(compiled.text) if kernel.products)
    assert kernel.times == 5
    assert kernel.products[0].types == "f32 x f32 -> f32"


def test_a_jitted_functions_scopes_name_its_layers():
    def function(x, w):
        with jax.named_scope("stage1"), jax.named_scope("conv1"):
            return x @ w

    compiled = compile_for("cpu", function, shape(64, 64, dtype=F32), shape(64, 64, dtype=F32))
    assert [kernel.layer for kernel in kernels(compiled.text) if kernel.products] == [
        "stage1/conv1"
    ]
