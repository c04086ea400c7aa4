"""Replays of certificates: equal networks pass, and the first tensor that differs is named."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from integer import float_cases, graphs
from references import integer_graph

from jaxqat.errors import ExportError
from jaxqat.export import _replay, export_certificate
from jaxqat.export._certificate import WrongProductError
from jaxqat.integer._execute.cpu import Cpu

# Neither jaxqat nor JAX can be imported.
ALONE = """
import runpy, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "jaxqat", "onnx"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def graph():
    """Dense layers: they compile fast."""
    return graphs.build("mlp")


@pytest.fixture(scope="module")
def certified(graph, tmp_path_factory):
    """An exported file and, beside it, its certificate; do not change them."""
    pytest.importorskip("onnxruntime")
    from jaxqat.export import export_onnx

    file = tmp_path_factory.mktemp("certified") / "n.onnx"
    export_onnx(graph, file, input="uint8")
    pixels = graphs.pixels(graph, 5)
    return file, export_certificate(graph, f"{file}.certificate", pixels, file=file)


@pytest.fixture
def copy(certified, tmp_path):
    """A copy of both, which a test may change."""
    folder = shutil.copytree(certified[0].parent, tmp_path / "copy")
    return folder / "n.onnx", folder / "n.onnx.certificate"


def replay(folder, *arguments):
    return _replay.main(["--folder", str(folder), *map(str, arguments)])


def test_a_certificate_has_the_codes_of_every_tensor_in_the_order_of_the_network(graph, certified):
    certificate, arrays = _replay.read(certified[1])
    codes, result = integer_graph.run(graph, arrays["input"])
    shown = [entry for entry in certificate["tensors"] if entry["sha256"]]
    assert [entry["name"] for entry in shown] == [
        n.output for n in graph.nodes if n.output in codes
    ]
    for entry in shown:
        assert entry["sha256"] == _replay.sha256(codes[entry["name"]])
    assert certificate["results"][0]["sha256"] == _replay.sha256(result)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_replay_needs_nothing_of_jaxqat_and_an_unmodified_file_passes(
    certified, tmp_path, runtime
):
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    # In a process of its own: OpenVINO leaves another stack for signals behind.
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, certified[1] / "replay.py", "--runner", runtime],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # OpenVINO multiplies the last sums in another order.
    equal = "5" if runtime == "onnxruntime" else "[45]"
    assert re.search(
        rf"^equal: {equal} of 5 tensors and results; nothing differs$", done.stdout, re.M
    )


def test_one_changed_weight_code_in_a_file_is_found_and_its_tensor_named(copy, capsys):
    import onnx

    file, folder = copy
    model = onnx.load(file)
    (weights,) = (x for x in model.graph.initializer if x.name == "dense2/weights")
    array = onnx.numpy_helper.to_array(weights).copy()
    certificate, arrays = _replay.read(folder)
    (read,) = (x["array"] for x in certificate["tensors"] if x["name"] == "dense1/output")
    array[arrays[read].astype(int).std(0).argmax(), 3] ^= 64  # Of an input that is no constant.
    weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
    onnx.save(model, file)
    assert replay(folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["first"]["name"] == "dense2/output" and found["first"]["differing"] > 0
    assert found["file_changed"]
    verdicts = {row["name"]: row["verdict"] for row in found["rows"]}
    assert verdicts.pop("dense2/output") == "differs"
    assert verdicts.pop("result") in ("behind", "differs")
    assert set(verdicts.values()) == {"equal"}


def runner_of(graph, monkeypatch):
    """Make the NumPy interpreter of a graph the module `my_runner`."""

    def run(images):
        codes, result = integer_graph.run(graph, images)
        return {**codes, "result": result}

    monkeypatch.setitem(sys.modules, "my_runner", types.SimpleNamespace(run=run))


def with_broken(graph, name):
    """Return a network one kernel of which adds one accumulator too many to its last channel."""

    def broken(node):
        step = (np.arange(node.channels) == node.channels - 2) * np.int32(2 / node.multiplier[-2])
        return dataclasses.replace(node, bias=(node.bias + step).astype(np.int32))

    nodes = [broken(node) if node.name == name else node for node in graph.nodes]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def test_a_broken_kernel_of_a_users_own_runner_is_named(graph, certified, monkeypatch, capsys):
    runner_of(graph, monkeypatch)
    assert replay(certified[1], "--runner", "my_runner:run") == 0
    runner_of(with_broken(graph, "dense1"), monkeypatch)
    assert replay(certified[1], "--runner", "my_runner:run") == 1
    shown = capsys.readouterr().out
    assert "FIRST DIFFERENCE: dense1/output (made by dense1): " in shown
    assert "of 120 values differ, by up to 2" in shown


def test_without_stored_codes_the_digest_names_the_tensor(
    graph, certified, tmp_path, monkeypatch, capsys
):
    images = _replay.read(certified[1])[1]["input"]
    folder = export_certificate(graph, tmp_path / "small", images, store_codes=False)
    with np.load(folder / "golden.npz") as file:
        assert set(file.files) == {"input", "result0"}
    runner_of(graph, monkeypatch)
    assert replay(folder, "--runner", "my_runner:run") == 0
    runner_of(with_broken(graph, "dense2"), monkeypatch)
    assert replay(folder, "--runner", "my_runner:run") == 1
    assert "FIRST DIFFERENCE: dense2/output (made by dense2): its SHA-256 differs" in (
        capsys.readouterr().out
    )


def entry(name, reads, array, *, by_island=False):
    described = {"shape": list(array.shape), "dtype": array.dtype.name, "array": name}
    described |= {"sha256": _replay.sha256(array), "layer": name, "reads": reads}
    return {"name": name, "by_island": by_island, **described}


def island():
    """A tensor, one that an island makes of it, one behind that, and a result."""
    rng = np.random.default_rng(0)
    names = ("before", "made", "behind")
    arrays: dict[str, Any] = {
        name: rng.integers(-100, 100, (4, 100)).astype(np.int8) for name in names
    }
    arrays["result"] = rng.normal(size=(4, 3)).astype(np.float32)
    tensors = [
        entry("before", [], arrays["before"]),
        entry("made", ["real"], arrays["made"], by_island=True),
        entry("behind", ["made"], arrays["behind"]),
    ]
    real = {"name": "real", "reads": ["before"], "sha256": "", "array": None}
    certificate = {
        "input": {"shape": [4]},
        "tensors": [tensors[0], real, *tensors[1:]],
        "results": [entry("result", ["behind"], arrays["result"])],
        "limits": {"share": 5e-3, "island_result": 1e-4, "result": 2.0**-20},
    }
    return certificate, arrays


def verdicts(changes):
    certificate, arrays = island()
    found = {name: array.copy() for name, array in arrays.items()}
    for name, place, change in changes:
        found[name][place] += change
    return [row["verdict"] for row in _replay.compare(certificate, arrays, found)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], ["equal"] * 4),
        # A rounding of the island in image 1, and what follows from it.
        ([("made", (1, 5), 1), ("behind", (1, 7), 9)], ["equal", "rounding", "behind", "equal"]),
        # The same, and a wrong code of an image whose codes were equal up to there.
        ([("made", (1, 5), 1), ("behind", (2, 7), 1)], ["equal", "rounding", "differs", "equal"]),
        # No rounding: by two; in too many places.
        ([("made", (1, 5), 2)], ["equal", "differs", "equal", "equal"]),
        ([("made", (1, slice(9)), 1)], ["equal", "differs", "equal", "equal"]),
        # The island reads what is wrong already.
        ([("before", (0, 0), 1), ("made", (0, 0), 5)], ["differs", "behind", "equal", "equal"]),
        # Results: other roundings of a product, and an error of one unit in 100,000.
        ([("result", (0, 0), 2e-7)], ["equal", "equal", "equal", "rounding"]),
        ([("result", (0, 0), 3e-5)], ["equal", "equal", "equal", "differs"]),
    ],
)
def test_a_difference_is_judged_where_it_arises(changes, expected):
    assert verdicts(changes) == expected


def test_a_network_with_islands_is_certified_and_replayed(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    from jaxqat.export import export_onnx

    graph = float_cases.island()
    file = export_onnx(graph, tmp_path / "n.onnx", input="uint8")
    pixels = graphs.pixels(graph, 4)
    folder = export_certificate(graph, tmp_path / "certificate", pixels, file=file)
    assert replay(folder) == 0
    assert "FIRST DIFFERENCE" not in capsys.readouterr().out


def test_nothing_is_certified_that_numpy_computes_otherwise(graph, tmp_path, monkeypatch):
    right = Cpu.accumulate
    monkeypatch.setattr(
        Cpu, "accumulate", lambda *a: right(*a).at[0, 0].add(10_000 * (a[1].name == "dense2"))
    )
    with pytest.raises(
        WrongProductError, match=r"node 'dense2': 1 of 80 values .* `jaxqat doctor`"
    ):
        export_certificate(graph, tmp_path / "certificate", graphs.pixels(graph, 5))
    assert not (tmp_path / "certificate").exists()


def test_what_cannot_be_replayed_has_the_status_2_and_a_reason(copy, capsys):
    file, folder = copy
    assert replay(folder, "--runner", "tensorrt") == 2
    assert "--runner must be onnxruntime, openvino, stablehlo, jaxqat" in capsys.readouterr().err
    file.unlink()
    assert replay(folder) == 2
    assert "n.onnx: there is no such file" in capsys.readouterr().err
    with np.load(folder / "golden.npz") as content:
        arrays = {name: content[name].copy() for name in content.files}
    arrays["codes1"][0, 0] ^= 1
    np.savez(folder / "golden.npz", **arrays)
    assert replay(folder) == 2
    assert "golden.npz is damaged" in capsys.readouterr().err


def test_inputs_that_the_file_does_not_take_are_refused(graph, certified, tmp_path):
    pixels = graphs.pixels(graph, 2).astype(np.float32)
    message = rf"{certified[0]}: takes uint8 inputs; the golden ones are float32"
    with pytest.raises(ExportError, match=message):
        export_certificate(graph, tmp_path / "new", pixels, file=certified[0])
    assert not list(tmp_path.iterdir())


def test_an_existing_certificate_is_replaced_only_on_request(graph, certified):
    with pytest.raises(ExportError, match="already exists; give another name or pass overwrite"):
        export_certificate(graph, certified[1], graphs.pixels(graph, 1))
