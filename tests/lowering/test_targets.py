"""Compiling for a target: memory, errors, and no side effects."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from lowering.functions import CASES, F32, S32, convolve, shape
from lowering.targets import GPUS, TPUS, for_targets, on_all

from jaxqat.lowering import TARGETS, LoweringError, compile_for

ROWS, COLUMNS = 128, 256  # Multiples of every tile, so there is no padding.
MATRIX = shape(ROWS, COLUMNS, dtype=F32)
BYTES = ROWS * COLUMNS * 4


@on_all
def test_memory_is_that_of_the_arguments(target):
    compiled = compile_for(target, lambda x, y: (x + y, x - y), MATRIX, MATRIX)
    assert compiled.target is target
    assert compiled.argument_bytes == 2 * BYTES
    assert "input_output_alias" not in compiled.text


@on_all
def test_a_jitted_function_keeps_its_donated_arguments(target):
    step = jax.jit(lambda state, x: state + x, donate_argnums=0)
    text = compile_for(target, step, MATRIX, MATRIX).text
    assert re.search(r"input_output_alias=\{ *\{\}: \(0, \{\}", text)  # The result is argument 0.


def test_trees_of_arrays_shapes_and_keys_are_arguments():
    def function(tree, key):
        return tree["a"] + jax.random.normal(key, tree["b"][0].shape)

    tree = {"a": jnp.ones(3), "b": [jax.ShapeDtypeStruct((3,), F32)]}
    assert "->f32[3]" in compile_for("cpu", function, tree, jax.random.key(0)).text


@pytest.mark.parametrize("arguments", [(), (3,), (MATRIX, "name")], ids=["none", "int", "text"])
def test_other_arguments_are_an_error(arguments):
    with pytest.raises(LoweringError, match="the arguments must be arrays or"):
        compile_for("cpu", lambda *_: 0, *arguments)


def test_an_unknown_target_is_an_error_that_lists_the_known():
    with pytest.raises(
        LoweringError, match=r"target must be one of cpu, sm_75, .*v6e, got 'sm_70'"
    ):
        compile_for("sm_70", jnp.sin, MATRIX)


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [("sm_90", "jax_cuda13_plugin", r"jax\[cuda13\]"), ("tpu_v5e", "libtpu", r"jax\[tpu\]")],
)
def test_a_missing_compiler_is_an_error_with_the_command_that_installs_it(name, package, command):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(LoweringError, match=rf'not installed; pip install "{command}" installs it'):
        compile_for(name, jnp.sin, MATRIX)


@for_targets(GPUS)
def test_a_failed_compilation_is_an_error_with_the_compilers_reason(target):
    shapes = CASES["s8_convolution"].shapes[:2]
    with pytest.raises(LoweringError, match=rf"\({target.name}\): UNIMPLEMENTED: .*CuDNN"):
        compile_for(target, lambda x, w: convolve(x, w, S32), *shapes)


def test_a_failed_lowering_is_an_error_with_its_reason():
    def function(x):
        kernel = pl.pallas_call(lambda x_ref, y_ref: None, out_shape=MATRIX)
        return kernel(x)

    with pytest.raises(LoweringError, match=r"this machine's CPU \(cpu\): .*interpret"):
        compile_for("cpu", function, MATRIX)


def test_an_unknown_compiler_option_is_an_error_that_names_it():
    with pytest.raises(LoweringError, match="xla_of_nobody"):
        compile_for("cpu", jnp.sin, MATRIX, compiler_options={"xla_of_nobody": 1})


def test_errors_in_the_function_are_raised_unchanged():
    def function(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compile_for("cpu", function, MATRIX)


SCRIPT = """
import os, sys
import jax, jax.numpy as jnp
if "started" in sys.argv:
    jnp.ones(3).block_until_ready()
from jaxqat.lowering import compile_for
before = dict(os.environ)
compile_for({name!r}, jnp.sin, jax.ShapeDtypeStruct((64, 64), jnp.float32))
assert dict(os.environ) == before
assert {{d.platform for d in jnp.ones(3).devices()}} == {{"cpu"}}
print("compiled", flush=True)
sys.stdin.read()
"""


@for_targets(("sm_90", "tpu_v5e"))
@pytest.mark.parametrize("started", ["started", "fresh"])
def test_compilation_works_before_and_after_jax_starts_and_changes_no_environment(target, started):
    # Without JAX_PLATFORMS, JAX tries every plugin when it starts; CUDA's fails its own checks.
    ours = ("JAX_", "TPU_", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    script = SCRIPT.format(name=target.name)
    done = subprocess.run(
        [sys.executable, "-c", script, started],
        input="",
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout == "compiled\n", done.stderr


@for_targets(TPUS[:1])
def test_two_processes_compile_for_a_tpu_at_once(target):
    command = [sys.executable, "-c", SCRIPT.format(name=target.name)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as one:
        assert one.stdout and one.stdout.readline() == "compiled\n"
        # The first process keeps libtpu until its input ends.
        done = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
        one.communicate("")
    assert done.stdout == "compiled\n", done.stderr


def test_targets_are_listed_under_their_names():
    assert all(name == target.name for name, target in TARGETS.items())
    assert {t.gpu.capability for t in TARGETS.values() if t.gpu} == {(7, 5), (8, 0), (9, 0)}
