"""Machine code of the Pallas convolution: int8 tensor cores, exact rounding, no copies."""

import collections
import math
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering.targets import for_targets

from jaxqat.integer._execute.pallas_conv import Residual, convolve
from jaxqat.integer._execute.pallas_tiles import Geometry, Tile, padded_channels, padded_depth
from jaxqat.lowering import compile_for, kernels, products

on_supported = for_targets(("sm_80", "sm_90"))

# Size, input channels, output channels, window, stride, whether it ends a residual block.
LAYERS = {
    "stem": (32, 3, 64, 3, 1, False),
    "stage1/conv1": (32, 64, 64, 3, 1, False),
    "stage1/conv2": (32, 64, 64, 3, 1, True),
    "stage2/conv1": (32, 64, 128, 3, 2, False),
    "stage2/shortcut": (32, 64, 128, 1, 2, False),
    "stage2/conv2": (16, 128, 128, 3, 1, True),
    "stage3/conv1": (16, 128, 256, 3, 2, False),
    "stage3/shortcut": (16, 128, 256, 1, 2, False),
    "stage3/conv2": (8, 256, 256, 3, 1, True),
    "stage4/conv1": (8, 256, 512, 3, 2, False),
    "stage4/shortcut": (8, 256, 512, 1, 2, False),
    "stage4/conv2": (4, 512, 512, 3, 1, True),
    "imagenet_stem": (224, 3, 64, 7, 2, False),
    "tails": (9, 20, 36, 3, 2, True),
}
BATCHES = {"of_1024": 1024, "of_1": 1}
ZERO = -128  # A zero point: biases depend on the edges, so the kernel does more.


def geometry_of(size, window, stride):
    pad = ((window - 1) // 2, (window - 1) // 2)
    return Geometry(
        size=(size, size), window=(window, window), strides=(stride, stride), padding=(pad, pad)
    )


def operands_of(inputs, outputs, geometry):
    depth = padded_depth(geometry.window, inputs)
    edges = 1 if geometry.inside else math.prod(edges.count for edges in geometry.edges)
    return (
        jax.ShapeDtypeStruct((outputs, depth), jnp.int8),
        jax.ShapeDtypeStruct((edges, outputs), jnp.int32),
        jax.ShapeDtypeStruct((outputs,), jnp.float32),
    )


def layer(x, operands, geometry, other=None, tile=None):
    residual = (
        other
        if other is None
        else Residual(
            codes=other,
            zero_point=ZERO,
            multiplier=np.float32(0.6875),
            branch_zero_point=3,
            branch_low=-128,
            branch_high=127,
            branch_multiplier=np.float32(1.25),
        )
    )
    codes = {"zero_out": ZERO, "low": -128, "high": 127}
    return convolve(x, *operands, geometry=geometry, residual=residual, tile=tile, **codes)


# Inline assembly puts several instructions on a line, each possibly with a predicate.
INSTRUCTION = re.compile(r"(?:^|;)\s*(@!?%\w+\s+)?([a-z][\w.:]*)\s", re.MULTILINE)


def instructions(ptx):
    """Count the instructions by full name, with or without predicate."""
    return collections.Counter(found[2] for found in INSTRUCTION.finditer(ptx))


def code_in(folder):
    """Return the file with the convolution's code; a fusion before it has its own file."""
    files = sorted(pathlib.Path(folder).glob("*.ptx"))
    return next(path for path in files if "mma" in path.read_text())


def assembled(ptx, folder):
    """Return the resource report of NVIDIA's assembler, which comes with the compiler."""
    nvidia = pytest.importorskip("nvidia")
    assembler = next(pathlib.Path(p) / "cu13/bin/ptxas" for p in nvidia.__path__)
    architecture = re.search(r"^\.target (sm_\w+)", ptx.read_text(), re.MULTILINE)
    assert architecture is not None
    command = [assembler, "-v", f"-arch={architecture[1]}", ptx, "-o", folder / "out.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
@on_supported
def test_a_layer_is_one_kernel_on_int8_tensor_cores(target, shape, batch, tmp_path):
    size, inputs, outputs, window, stride, sums = shape
    geometry = geometry_of(size, window, stride)
    x = jax.ShapeDtypeStruct((batch, size, size, inputs), jnp.int8)
    other = jax.ShapeDtypeStruct((batch, *geometry.output, outputs), jnp.int8) if sums else None
    compiled = compile_for(
        target,
        lambda x, operands, other: layer(x, operands, geometry, other),
        x,
        operands_of(inputs, outputs, geometry),
        other,
        compiler_options={"xla_dump_to": str(tmp_path)},
    )
    found = kernels(compiled.text)
    assert [kernel.name for kernel in found][-1] == "int8_convolution"
    # Three channels are padded to four. In a network, the kernel that makes the codes pads them.
    assert [kernel.what for kernel in found][:-1] == ["copy"] * (inputs % 4 != 0)
    (product,) = products(found)
    assert product.is_integer and product.engine == "Pallas"

    ptx = code_in(tmp_path)
    names = instructions(ptx.read_text())
    tensor = [n for n in names if re.match(r"(wgmma\.mma_async|mma\.sync).*\.s32\.s8\.s8", n)]
    assert tensor and not any(name.startswith(("dp4a", "mad.lo.s16")) for name in names)
    # Products have their own rounding; a plain 'mul.f32' could be fused with an addition.
    assert names["mul.rn.f32"] and not names["mul.f32"]
    assert not any(name.startswith("fma") for name in names)
    # Operands move in vectors, never byte by byte; codes written by a tiny tile may.
    assert batch == 1 or not any(re.match(r"(ld|st)\.shared.*\.[bsu]8$", n) for n in names)
    assert " 0 bytes spill stores, 0 bytes spill loads" in assembled(ptx, tmp_path)


@on_supported
def test_a_tail_touches_no_memory_beyond_its_tensors(target, tmp_path):
    size, inputs, outputs, window, stride, _ = LAYERS["tails"]
    batch, geometry = 1023, geometry_of(size, window, stride)
    # With one stage, operands are loaded by plain instructions with visible predicates.
    tile = Tile(rows=128, outputs=64, block=64, warps=4, stages=1)
    assert batch * math.prod(geometry.output) % tile.rows and outputs % tile.outputs
    compile_for(
        target,
        lambda x, operands, other: layer(x, operands, geometry, other, tile),
        jax.ShapeDtypeStruct((batch, size, size, inputs), jnp.int8),
        operands_of(inputs, outputs, geometry),
        jax.ShapeDtypeStruct((batch, *geometry.output, outputs), jnp.int8),
        compiler_options={"xla_dump_to": str(tmp_path)},
    )
    code = code_in(tmp_path).read_text()
    found = [m for m in INSTRUCTION.finditer(code) if re.match(r"(ld|st)\.global", m[2])]
    kinds = collections.Counter(m[2].partition(".")[0] for m in found)
    assert kinds["st"] and kinds["ld"] > kinds["st"]  # Codes, weights, biases, the other summand.
    assert all(m[1] for m in found)


@on_supported
def test_hopper_uses_its_own_instructions_for_large_tiles(target, tmp_path):
    geometry = geometry_of(16, 3, 1)
    x = jax.ShapeDtypeStruct((256, 16, 16, 128), jnp.int8)
    operands = operands_of(128, 128, geometry)
    compile_for(
        target,
        lambda x, operands: layer(x, operands, geometry),
        x,
        operands,
        compiler_options={"xla_dump_to": str(tmp_path)},
    )
    names = instructions(code_in(tmp_path).read_text())
    assert any(name.startswith("wgmma") for name in names) == (target.name == "sm_90")
    # Masked asynchronous copies of 16 bytes bring both operands.
    assert names["cp.async.cg.shared.global"]


def resnet18():
    """Yield the convolutions of ResNet-18 in order: name, geometry, inputs, outputs."""
    yield "stem", geometry_of(32, 3, 1), 3, 64
    inputs, size = 64, 32
    for stage, outputs in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            stride = 2 if stage > 1 and block == 0 else 1
            path = f"stage{stage}/block{block}"
            if stride == 2:
                yield f"{path}/shortcut", geometry_of(size, 1, 2), inputs, outputs
            yield f"{path}/conv1", geometry_of(size, 3, stride), inputs, outputs
            size //= stride
            yield f"{path}/conv2", geometry_of(size, 3, 1), outputs, outputs
            inputs = outputs


def network(geometries, operands, images):
    """Compute ResNet-18 from float images to the codes before pooling."""
    x = jnp.clip(jnp.round(images * np.float32(40)), -128, 127).astype(jnp.int8)
    x = layer(x, operands["stem"], geometries["stem"])
    for path in dict.fromkeys(name.rpartition("/")[0] for name in geometries if "/" in name):
        names = [f"{path}/{part}" for part in ("shortcut", "conv1", "conv2")]
        skip = x
        if names[0] in geometries:
            skip = layer(x, operands[names[0]], geometries[names[0]])
        x = layer(x, operands[names[1]], geometries[names[1]])
        x = layer(x, operands[names[2]], geometries[names[2]], skip)
    return x


@on_supported
def test_a_network_reads_and_writes_only_codes(target):
    batch, found = 64, list(resnet18())
    geometries = {name: geometry for name, geometry, *_ in found}
    operands = {name: operands_of(i, o, geometry) for name, geometry, i, o in found}
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    compiled = compile_for(
        target, lambda ops, images: network(geometries, ops, images), operands, images
    )
    quantize, *layers = kernels(compiled.text)
    # The images are read once; their three channels of codes are padded when written.
    assert quantize.what == "elementwise"
    assert quantize.bytes_written == batch * 32 * 32 * padded_channels(3)
    assert (
        [kernel.name for kernel in layers]
        == ["int8_convolution"] * 20
        == ["int8_convolution" for _ in found]
    )
    # Every layer writes only the codes of its output, without padded, transposed or float copies.
    assert sum(kernel.bytes_written for kernel in layers) == sum(
        batch * math.prod(geometry.output) * outputs for _, geometry, _, outputs in found
    )
    # It reads its input, its operands and, at the end of a block, the other summand.
    wanted = batch * sum(math.prod(g.size) * padded_channels(i) for _, g, i, _ in found)
    wanted += sum(a.size * a.dtype.itemsize for arrays in operands.values() for a in arrays)
    wanted += batch * sum(
        math.prod(g.output) * o for name, g, _, o in found if name.endswith("conv2")
    )
    assert sum(kernel.bytes_read for kernel in layers) == wanted
