"""`jaxqat doctor` passes where all is right, and names what is wrong: products, versions, space."""

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from references import integer_graph
from tiny_run import files, run_command

import jaxqat
from jaxqat.commands import doctor
from jaxqat.integer import _self_test as tests
from jaxqat.integer import graph as g
from jaxqat.integer._execute.cpu import Cpu
from jaxqat.integer._numpy_products import codes, sums
from jaxqat.quant._numerics.products import Convolution

pytestmark = pytest.mark.slow

finished, console = tiny_run.finished, tiny_run.console


@pytest.fixture
def few(monkeypatch):
    """Test three of the built-in shapes only."""
    cases = tests.built_in_cases()
    chosen = [cases[3], cases[6], cases[8]]
    monkeypatch.setattr(tests, "built_in_cases", lambda: chosen)
    return chosen


def examine(console, **options):
    found = doctor.doctor(console=console, **options)
    return found, " ".join(console.file.getvalue().split())


def test_every_shape_of_a_run_is_tested_in_every_way_and_nothing_is_written(finished, capsys):
    before = files(finished)
    assert run_command("doctor", finished, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    layers = [node.name for node in jaxqat.load(finished / "integer").products()]
    ways = {"integer network", "training", "fast training", "ONNX Runtime"}
    for way in ways:
        tested = [product for product in found["products"] if product["way"] == way]
        assert sorted(x for product in tested for x in product["layers"]) == sorted(layers)
        assert all(product["values"] > 0 and not product["differing"] for product in tested)
    assert {product["way"] for product in found["products"]} == ways
    assert found["versions"]["jax"] == jax.__version__
    assert found["problems"] == [] and "nothing is wrong" in err
    assert files(finished) == before


@pytest.mark.parametrize("case", tests.built_in_cases(), ids=lambda case: case.shape)
def test_the_products_that_numpy_computes_are_those_of_the_definition(case):
    graph = case.graph(requantized=False)
    (node,) = graph.products()
    total = sums(node, case.units)
    assert np.array_equal(total, integer_graph.product(node, case.units.astype(np.int64)))
    # The largest sums occur, and both ends of the codes.
    window = case.node.weights[..., 0].size // case.source.shape[-1] or 1
    assert abs(total).max() >= 127 * 125 * case.source.shape[-1] // case.node.groups * window // 2
    if case.out is not None:
        (node,) = case.graph(requantized=True).products()
        step = integer_graph.step(
            node, {"input": case.source, "output": case.out},
            {"input": (case.units + case.source.zero_point).astype(np.int8)},
        )  # fmt: skip
        expected = integer_graph.stored(case.out, step)
        assert np.array_equal(codes(node, total, case.out), expected)
        assert len(np.unique(expected)) > 200


@pytest.mark.parametrize("padding", [((0, 2), (3, 1)), ((-1, 2), (1, -2))])
def test_numpy_pads_crops_strides_dilates_and_groups_by_the_definition(padding):
    rng = np.random.default_rng(0)
    case = tests.built_in_cases()[7]
    node = dataclasses.replace(
        case.node, weights=rng.integers(-127, 128, (3, 2, 8, 12)).astype(np.int8), groups=4,
        strides=(2, 1), dilation=(1, 3), padding=padding,
    )  # fmt: skip
    values = rng.integers(-255, 256, (2, 9, 8, 32))
    assert np.array_equal(sums(node, values), integer_graph.product(node, values))


def test_results_of_another_shape_and_numbers_that_are_not_finite_are_failures(few):
    def way(result):
        return lambda case: tests.Computed(pairs=[(np.zeros(2), result)])

    assert tests.check(few[0], "way", way(np.array([0, 1.5]))).differing == 1
    for result in (np.zeros(3), np.array([0, np.nan]), np.array([0, np.inf])):
        found = tests.check(few[0], "way", way(result))
        assert "shape" in found.error or "not finite" in found.error


def test_a_network_is_tested_once_for_each_shape_grid_and_kind_of_result():
    def product(name, source, output, outputs=4):
        ones = np.ones(outputs, np.float32)
        return g.Product(
            name=name, inputs=(source,), output=output, kind="dense", multiplier=ones,
            weights=np.ones((4, outputs), np.int8), bias=np.zeros(outputs, np.int32),
            weight_scale=ones,
        )  # fmt: skip

    def tensor(name, zero_point=-128):
        return g.Tensor(name=name, shape=(4,), scale=np.float32(1), zero_point=zero_point)

    names = ("a", "b", "c", "d")
    tensors = {name: tensor(name, 3 if name == "d" else -128) for name in names}
    graph = g.IntegerGraph(
        inputs=(g.Input(shape=(4,)),), tensors=tensors,
        outputs=(g.Output(name="result", shape=(4,)),),
        nodes=(
            g.Quantize(name="q", inputs=(g.INPUT,), output="a", inverse=np.float32(1)),
            product("first", "a", "b"), product("second", "b", "c"), product("third", "c", "d"),
            product("fourth", "d", "result"),
        ),
    )  # fmt: skip
    cases = tests.cases_of(graph)
    assert [case.layers for case in cases] == [("first", "second", "third"), ("fourth",)]
    assert [case.out is None for case in cases] == [False, True]


@pytest.mark.parametrize(
    ("kernel", "way"),
    [
        ("integer network", "integer network"),
        ("training", "training"),
        ("ONNX Runtime", "ONNX Runtime"),
    ],
)
def test_a_wrong_kernel_is_named_with_its_shape_and_the_status_is_1(
    few, console, monkeypatch, kernel, way
):
    """The 1x1 convolution is wrong by one, for the last channel of one image only."""
    if kernel == "integer network":
        right = Cpu.accumulate

        def wrong(self, node, arrays, codes):
            total = right(self, node, arrays, codes)
            return total.at[3, ..., -1].add(1) if node.window == (1, 1) else total

        monkeypatch.setattr(Cpu, "accumulate", wrong)
    elif kernel == "training":
        of_training = Convolution._widened

        def wrong_too(self, codes, weights):
            total = of_training(self, codes, weights)
            return total.at[3, ..., -1].add(1) if weights.shape[:2] == (1, 1) else total

        monkeypatch.setattr(Convolution, "_widened", wrong_too)
    else:
        pytest.importorskip("onnxruntime")
        from jaxqat.export._onnx import nodes

        of_onnx = nodes.OnnxWriter._bias

        def another_bias(self, node, scales):
            step = np.int32(1 / scales[-1])  # One code.
            more = step * (np.arange(node.channels) == node.channels - 1)
            if node.window == (1, 1):
                node = dataclasses.replace(node, bias=(node.bias + more).astype(np.int32))
            return of_onnx(self, node, scales)

        monkeypatch.setattr(nodes.OnnxWriter, "_bias", another_bias)
    found, shown = examine(console)
    wrong_ones = [(x.way, x.shape) for x in found.products if x.differing or x.error]
    assert wrong_ones == [(way, "1x1 conv, 16 to 32 channels, stride 2, on 16x16")]
    (problem,) = found.problems
    assert problem.what.startswith(f"{way}: 1x1 conv, 16 to 32 channels, stride 2, on 16x16: ")
    assert "by up to 1" in problem.what and "install another" in problem.repair
    assert problem.what in shown and problem.repair in shown and "nothing is wrong" not in shown
    assert found.failures == (f"{problem.what}. {problem.repair}",)


def test_a_kernel_that_does_not_run_is_a_problem_and_the_others_are_tested(
    few, console, monkeypatch
):
    def fail(self, node, codes, weights):
        raise RuntimeError("UNIMPLEMENTED: no such kernel\nmore lines")

    monkeypatch.setattr(Cpu, "depthwise", fail)
    found, _ = examine(console)
    (problem,) = found.problems
    assert problem.what.startswith(
        "integer network: 3x3 conv, 32 to 32 channels, groups 32, on 8x8"
    )
    assert problem.what.endswith("RuntimeError: UNIMPLEMENTED: no such kernel")
    assert len(found.products) == len(few) * len({x.way for x in found.products})


@pytest.fixture
def none(monkeypatch):
    """Test no product."""
    monkeypatch.setattr(tests, "built_in_cases", list)


def test_a_version_that_does_not_fit_is_named_with_the_command(none, console, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.4.1" if name == "jax" else version(name)
    )
    found, _ = examine(console)
    assert found.versions["jax"] == "0.4.1"
    assert {(x.what, x.repair) for x in found.problems} == {
        ("jax 0.4.1 is installed, and jaxqat needs jax>=0.10.2", "pip install 'jax>=0.10.2'")
    }


def test_little_space_and_a_cache_that_cannot_be_written_are_named(
    none, console, monkeypatch, tmp_path
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    file = tmp_path / "file"
    file.touch()
    settings: Any = jax.config
    before = settings.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(file / "cache"))
    try:
        found, _ = examine(console)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found.compilation_cache == str(file / "cache")
    told = [problem.what for problem in found.problems]
    assert f"{file / 'cache'}: compiled programs cannot be kept there" in told[0]
    assert len(told) == 4 and all("1,000 bytes are free" in each for each in told[1:])


def test_versions_of_jax_that_do_not_fit_are_told_and_not_a_traceback(tmp_path):
    """`import jax` fails as it does beside another jaxlib."""
    (tmp_path / "jax.py").write_text("raise RuntimeError('jaxlib is too old')\n")
    code = "import sys; from jaxqat.cli import main; sys.exit(main(['doctor']))"
    paths = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}\n{code}"],
        capture_output=True, text=True,
    )  # fmt: skip
    shown = " ".join(done.stdout.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "wrong: JAX cannot be used: RuntimeError: jaxlib is too old." in shown
    assert "pip install --upgrade jax jaxlib" in shown


def test_a_folder_without_an_integer_network_is_bad_input(tmp_path, capsys):
    assert run_command("doctor", tmp_path) == 2
    assert "is not a run folder" in capsys.readouterr().err
