"""`jaxqat benchmark` end to end: its output, its file, its errors."""

import contextlib
import io
import json
import os
import socket
import stat

import pytest
import tiny_run
from references import integer_graph
from tiny_run import run_command

from jaxqat.bench import BenchmarkError, table
from jaxqat.bench.networks import make_images, random_network
from jaxqat.bench.table import print_benchmark
from jaxqat.commands import benchmark as module
from jaxqat.commands.benchmark import benchmark

pytestmark = pytest.mark.slow

console = tiny_run.console


@pytest.fixture
def nothing_to_measure(monkeypatch):
    """Make any measurement fail the test."""

    def measure(*arguments):
        raise AssertionError("a measurement was started")

    monkeypatch.setattr(module, "_inference", measure)
    monkeypatch.setattr(module, "_training", measure)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The benchmark of a ResNet-18 of width 4: exit status, JSON, printed text, JSON file."""
    path = tmp_path_factory.mktemp("benchmark") / "speed.json"
    arguments = ("benchmark", "--width", 4, "--batch_sizes", 2, "--rounds", 2, "--json", path)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "80")
        status = run_command(*arguments)
    return status, json.loads(path.read_text()), printed.getvalue(), path


def test_the_json_holds_command_network_environment_and_versions(measured):
    status, result, _, path = measured
    assert status == 0
    command = f"jaxqat benchmark --width 4 --batch_sizes 2 --rounds 2 --json {path}"
    assert result["command"] == command
    assert result["what"] == "inference"
    assert result["run"] is None
    assert result["rounds"] == 2
    assert result["threads"] == module.thread_count()
    assert {"before", "after"} == set(result["load_average"])
    assert {"device", "platform", "processor", "jax", "python", "date"} <= set(
        result["environment"]
    )
    assert set(result["versions"]) == {"jax", "onnxruntime", "openvino", "torch"}
    assert result["network"]["input_shape"] == [32, 32, 3]
    assert result["network"]["macs"] > 2e6
    assert result["images"] == "noise"
    assert result["roofline"] is None
    assert [batch["batch_size"] for batch in result["batches"]] == [2]


def test_every_engine_has_times_and_ratios_or_the_reason_why_not(measured):
    _, result, _, _ = measured
    for batch in result["batches"]:
        rows = {row["key"]: row for row in batch["engines"]}
        assert {"jax_fp32", "jax_bf16", "jax_integer", "ort_fp32", "ort_integer"} <= set(rows)
        assert {"ort_static", "openvino_fp32", "openvino_integer", "torch_fp32"} <= set(rows)
        for row in rows.values():
            if "not_measured" in row:
                assert "is not installed" in row["not_measured"]
                continue
            assert len(row["seconds"]) == 2
            assert min(row["seconds"]) <= row["median_s"] <= max(row["seconds"])
            expected = rows["jax_fp32"]["median_s"] / row["median_s"]
            assert row["ratio_to_jax_fp32"] == expected
            assert row["images_per_s"] == batch["batch_size"] / row["median_s"]
            assert (row["key"] == "jax_fp32") == ("agreement" not in row)


def test_notes_in_json_and_text_name_each_slower_integer_engine(measured):
    _, result, printed, _ = measured
    for batch in result["batches"]:
        rows = {row["key"]: row for row in batch["engines"]}
        slower = rows["jax_integer"]["median_s"] > rows["jax_fp32"]["median_s"]
        noted = any(n.startswith("JAX integer is slower than JAX FP32") for n in batch["notes"])
        assert noted == slower
        assert all(note in printed for note in batch["notes"])


def test_the_name_of_the_host_is_not_recorded(measured):
    _, result, printed, _ = measured
    names = {socket.gethostname(), os.uname().nodename}
    words = set(json.dumps(result).replace('"', " ").split()) | set(printed.split())
    assert not names & words
    assert "hostname" not in json.dumps(result)


def test_the_table_fits_a_narrow_terminal(measured):
    _, _, printed, _ = measured
    table = [line for line in printed.splitlines() if line.startswith("│")]
    assert len(table) >= 6
    assert all(len(line) <= 80 and "…" not in line for line in table)
    (row,) = [line for line in table if "JAX FP32" in line][:1]
    # Engine, images/s, ms, spread and ratio; JAX FP32 is the reference of the errors.
    assert len([cell for cell in row.split("│") if cell.strip()]) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "both"], "both"),
        (["--batch_sizes", "0"], "batch_sizes"),
        (["--batch_sizes", "many"], "batch_sizes"),
        (["--rounds", "0"], "rounds"),
        (["--rounds", "1.5"], "rounds"),
        (["--width", "-1"], "width"),
        (["--json", "{tmp}"], "json must be a file in an existing folder"),
        (["--json", "{tmp}/none/speed.json"], "json must be a file in an existing folder"),
        (["--what", "train", "--batch_sizes", "1", "2"], "batch_sizes must be one number"),
        (["--round", "3"], "the nearest right one is --rounds"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_are_named_before_measuring_and_leave_no_file(
    nothing_to_measure, tmp_path, capsys, arguments, message
):
    status = run_command("benchmark", *(a.format(tmp=tmp_path) for a in arguments))
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["inference", "train"])
def test_a_folder_that_is_not_a_run_is_named(tmp_path, capsys, what):
    assert run_command("benchmark", tmp_path / "none", "--what", what) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"what": "both"}, {"rounds": 0}, {"width": 0}, {"batch_sizes": [4, 0]}],
    ids=lambda options: next(iter(options)),
)
def test_the_function_checks_its_arguments_like_the_command(nothing_to_measure, options):
    (name,) = options
    with pytest.raises(BenchmarkError, match=f"{name} must be"):
        benchmark(**options)


def test_a_read_only_folder_is_an_error_before_measuring(nothing_to_measure, tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)  # Root may write anywhere.
    with pytest.raises(BenchmarkError, match="in a writable folder"):
        benchmark(json=tmp_path / "speed.json", width=4)


def test_a_package_whose_distribution_has_another_name_has_a_version(monkeypatch):
    def version(name):
        if name == "onnxruntime":
            raise module.importlib.metadata.PackageNotFoundError(name)
        return f"version of {name}"

    names = {"onnxruntime": ["onnxruntime-gpu"]}
    monkeypatch.setattr(module.importlib.metadata, "version", version)
    monkeypatch.setattr(module.importlib.metadata, "packages_distributions", lambda: names)
    assert module._version("onnxruntime") == "version of onnxruntime-gpu"


def test_the_random_network_neither_vanishes_nor_saturates():
    """Every tensor has many different codes, and the logits differ between images."""
    graph = random_network(4)
    codes, logits = integer_graph.run(graph, make_images(graph, 4))
    for name, values in codes.items():
        assert len(set(values.ravel().tolist())) > 8, name
    assert logits.std(0).min() > 0
    assert graph.metadata["name"] == "ResNet-18, width 4, random weights"


def test_shares_of_the_roofline_and_reasons_are_printed(console):
    row = {
        "key": "jax_integer", "label": "JAX integer (cuda)", "precision": "integer",
        "median_s": 0.5,
        "quartiles_s": [0.25, 0.75], "images_per_s": 4.0, "ratio_to_jax_fp32": 2.0,
        "ratio_to_ort_fp32": None, "roofline_share": 0.375,
        "agreement": {"error": 0.0, "against": "jax_fp32"},
    }  # fmt: skip
    absent = {"key": "x", "label": "JAX integer (x)", "not_measured": "no [kernel] for sm_75"}
    result = {
        "what": "inference", "rounds": 1, "threads": 2, "load_average": None, "images": "noise",
        "network": {"name": "net [bold]", "macs": 1, "input_shape": [2]}, "roofline": {},
        "environment": {"platform": "gpu", "device": "a GPU", "processor": "", "cpu_count": 1},
        "batches": [{"batch_size": 2, "engines": [row | {"ratio_to_ort_fp32": None}, absent],
                     "notes": ["int8 loses"]}],
    }  # fmt: skip
    print_benchmark(result, console)
    text = console.file.getvalue()
    assert "37.5 %" in text
    assert "100 %" in text  # The distance of the quartiles over the median.
    assert "net [bold]: batch 2" in text
    assert "JAX integer (x) is not measured: no [kernel] for sm_75" in text
    assert "int8 loses" in text
    assert "ORT" not in text


def test_one_round_has_no_spread():
    several, one = {"median_s": 0.5, "quartiles_s": [0.4, 0.6]}, {"median_s": 0.5}
    assert table.spread(several) == "40 %"
    assert table.spread(one | {"quartiles_s": [0.5, 0.5]}) == ""
    result = {
        "environment": {"platform": "gpu", "device": "a GPU", "cpu_count": 1},
        "load_average": None,
    }  # fmt: skip
    assert "medians of 3 rounds" in table.conditions(result | {"rounds": 3})
    assert table.conditions(result | {"rounds": 1}) == "a GPU; one round, so no spread."


def test_a_regular_file_and_no_temporary_one_is_left(measured):
    assert stat.S_ISREG(measured[3].stat().st_mode)
    assert [p.name for p in measured[3].parent.iterdir()] == [measured[3].name]
