"""Exported ONNX files in OpenVINO.

OpenVINO computes the same integer products, but requantizes differently. It adds the bias in float,
after the multiplication, which changes a code by one if the sum is within 2**-14 of a tie (some
roundings of values up to 2**8 units): about one code in 8,000. It also fuses a residual addition
into the convolution before it and rounds only the sum. The graph rounds the branch too, so many
codes differ by one.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from integer import graphs
from references import integer_graph

pytest.importorskip("onnx")
ov = pytest.importorskip("openvino")

from jaxqat.export._onnx.model import onnx_model  # noqa: E402
from jaxqat.export._onnx.runtime import with_codes  # noqa: E402
from jaxqat.integer import graph as g  # noqa: E402

BY_CASE = pytest.mark.parametrize("case", graphs.CASES)
BY_RECIPE = pytest.mark.parametrize("symmetric", [False, True], ids=["int8", "int8_symmetric"])
CPU_INFO = Path("/proc/cpuinfo")
NEEDS_VNNI = pytest.mark.skipif(
    not CPU_INFO.exists() or "vnni" not in CPU_INFO.read_text(),
    reason="without VNNI, OpenVINO's sums of uint8 x int8 products saturate at 16 bits",
)


def run(model, images):
    """Return all outputs by name."""
    core = ov.Core()
    network = core.read_model(model.SerializeToString())
    # With bfloat16 units, operations without an integer kernel would run in bfloat16. One thread:
    # with two, a strided 1x1 convolution sometimes gave wrong codes where the second one began.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(network, "CPU", options)
    result = compiled(images)
    return {name: result[i] for i, out in enumerate(compiled.outputs) for name in out.get_names()}


def disturbed(graph, images, seed):
    """Return results with all codes of residual additions, and 1 % of the others, off by one."""
    rng = np.random.default_rng(seed)
    codes = {}
    for node in graph.nodes:
        units = integer_graph.step(node, graph.tensors, codes, images, reals={g.INPUT: images})
        if node.output not in graph.tensors:
            return units
        if isinstance(node, g.Product | g.Add | g.Requantize | g.SumPool):
            share = 1 if isinstance(node, g.Add) else 0.01
            off = rng.choice([-1, 1], units.shape) * (rng.random(units.shape) < share)
            units = units + off
        codes[node.output] = integer_graph.stored(graph.tensors[node.output], units)
    tensor = graph.tensors[graph.output.name]
    return (codes[graph.output.name].astype(np.float32) - tensor.zero_point) * tensor.scale


@BY_CASE
def test_files_run_with_any_batch(case):
    graph = graphs.build(case)
    pixels = graphs.pixels(graph, 5)
    for n in (1, 5):
        for model, images in (
            (onnx_model(graph), graphs.normalized(pixels)),
            (onnx_model(graph, input="uint8"), pixels),
        ):
            result = run(model, images[:n])["logits"]
            assert result.shape == (n, *graph.output_shape)


@NEEDS_VNNI
@BY_RECIPE
@BY_CASE
def test_results_differ_no_more_than_other_roundings_allow(case, symmetric):
    graph = graphs.build(case, symmetric=symmetric)
    pixels = graphs.pixels(graph, 16)
    result = run(onnx_model(graph), graphs.normalized(pixels))["logits"]
    np.testing.assert_array_equal(run(onnx_model(graph, input="uint8"), pixels)["logits"], result)
    _, expected = integer_graph.run(graph, pixels)
    # The largest change in 20 trials with disturbed codes bounds OpenVINO's differences.
    trials = [disturbed(graph, pixels, seed) - expected for seed in range(20)]
    tolerance = np.abs(trials).max()
    assert tolerance < 0.2 * np.abs(expected).max()
    assert np.abs(result - expected).max() <= tolerance
    # If the two largest logits differ by more than twice that, the prediction is the same.
    second, first = np.sort(expected)[..., -2:].reshape(-1, 2).T
    clear = (first - second > 2 * tolerance).reshape(expected.shape[:-1])
    assert clear.any()
    np.testing.assert_array_equal(result.argmax(-1)[clear], expected.argmax(-1)[clear])


@NEEDS_VNNI
@BY_RECIPE
def test_codes_are_equal_except_near_ties_if_all_tensors_are_outputs(symmetric):
    graph = graphs.build("residual", symmetric=symmetric)
    images = graphs.normalized(graphs.pixels(graph, 8))
    model = onnx_model(graph)
    outputs = run(with_codes(model), images)
    entries = {entry.key: entry.value for entry in model.metadata_props}["codes"]
    expected, _ = integer_graph.run(graph, images)
    for name, entry in json.loads(entries).items():
        numbers = outputs[entry["output"]].astype(int) - entry["offset"]
        off = np.abs(numbers - np.moveaxis(expected[name], -1, 1))
        # A code of a residual branch is two units of the sum's grid.
        assert off.max() <= 2, name
        # Of the network's 30,000 codes, about 4 are near a tie. Each affects up to 9 * 12 of the
        # 1,536 codes of the next layer (7 %), but changes few of them, by less than one unit.
        assert np.mean(off > 0) < 0.05, name


SIGNAL = """
import faulthandler, os, signal, sys
import onnx
from jaxqat.export._onnx.openvino import compile_openvino

faulthandler.enable()  # As pytest does; it installs a signal stack.
model = onnx.load(sys.argv[1])
compiled = [compile_openvino(model) for _ in range(2)]
compiled.pop(0)  # In the order of their creation.
compiled.pop(0)
received = []
signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
os.kill(os.getpid(), signal.SIGINT)
assert received == [signal.SIGINT]
"""


def test_a_signal_after_two_models_were_deleted_reaches_its_handler(tmp_path):
    """OpenVINO leaves a freed signal stack behind, which ended the process with SIGSEGV."""
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_model(graphs.build("chain")).SerializeToString())
    script = [sys.executable, "-c", SIGNAL, str(path)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
