"""The command line: exit statuses, messages, signals; in separate processes where necessary."""

import functools
import importlib.util
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import typing
from pathlib import Path

import pytest
import soak
import tiny_run
import yaml
from tiny_run import SETTINGS, STEPS, run_command, without_privileges

from jaxqat import cli
from jaxqat.cli import parser, presets
from jaxqat.cli.signatures import load_command, signature
from jaxqat.commands import train
from jaxqat.integer._execute.executor import PLATFORMS
from jaxqat.lowering import TARGETS
from jaxqat.pipeline import config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TRAIN = train.train
open_tmp, same_run, small_network = tiny_run.open_tmp, tiny_run.finished, tiny_run.small_network
# The command with a small network.
COMMAND = [sys.executable, str(ROOT / "tests" / "tiny_run.py")]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def start(*arguments: object, compiled: Path | None = None) -> subprocess.Popen:
    """Start the command; `compiled` is a folder for its cache of compiled programs."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if compiled is not None:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr; kill the process after a timeout."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def lines_of(run: Path, stage: str) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count(f'"stage": "{stage}"') if path.exists() else 0


def wait_for_epoch(process: subprocess.Popen, run: Path, stage: str) -> None:
    """Wait until a stage has finished its first epoch."""
    deadline = time.monotonic() + 240
    while not lines_of(run, stage):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def arrays(run: Path) -> list[dict]:
    """Return the SHA-256 of all arrays at the end of both stages."""
    paths = [run / "checkpoints" / s / str(STEPS) / "info" / "metadata" for s in ("fp32", "qat")]
    return [json.loads(path.read_text())["arrays"] for path in paths]


def losses(run: Path) -> list[tuple]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["stage"], r["epoch"], r["loss"]) for r in records]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config_file) -> Path:
    """An uninterrupted run, compiled without a cache."""
    run = tmp_path_factory.mktemp("finished") / "run"
    status, out, err = finish(start("train", "--config", config_file, "--workdir", run))
    assert status == 0, err
    assert "PTQ" in out
    assert "integer" in out
    return run


@pytest.mark.slow
def test_a_run_stopped_by_signals_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path, config_file, finished, compiled, capsys
):
    run = tmp_path / "run"
    train = ("train", "--config", config_file, "--workdir", run)
    for stage, signum in (("fp32", signal.SIGTERM), ("qat", signal.SIGINT)):
        process = start(*train, compiled=compiled)
        wait_for_epoch(process, run, stage)
        if stage == "fp32":  # A second process leaves, and does not disturb the first.
            assert run_command(*train) == 2
            message = f"workdir {run}: another process trains in it (process {process.pid})"
            assert message in capsys.readouterr().err
        process.send_signal(signum)
        status, _, err = finish(process)
        assert status == 128 + signum
        assert "Run the same command to resume." in err
        assert "Traceback" not in err
        assert not (run / "results.json").exists()
    status, out, err = finish(start(*train, compiled=compiled))
    assert status == 0, err
    assert "resumed" in out or lines_of(run, "qat") == 2
    assert arrays(run) == arrays(finished)
    assert losses(run) == losses(finished)


def test_two_identical_runs_differ_in_nothing_but_times(finished, same_run):
    """In two processes, of which one had compiled other programs before."""
    outcomes = [soak.outcome(run) for run in (finished, same_run)]
    commands = {outcome["results.json"].pop("command") for outcome in outcomes}
    assert len(commands) == 2  # The second has no options, as a function called it.
    assert soak.differing(*outcomes) == []


def test_evaluate_and_report_need_only_the_folder(tmp_path, finished, small_network, capsys):
    run = tmp_path / "moved"
    shutil.copytree(finished, run)
    (run / "report.html").unlink()
    for stage, arguments in (("ptq", ("--stage", "ptq")), ("integer", ())):
        assert run_command("evaluate", run, *arguments) == 0
        out = capsys.readouterr().out
        entry = json.loads((run / "results.json").read_text())[stage]
        entry = entry["int8"] if stage == "ptq" else entry
        assert f"accuracy {100 * entry['test']['accuracy']:.2f} %" in out
        name = "ptq_int8" if stage == "ptq" else stage
        assert (run / "evaluations" / f"{name}_test.json").is_file()
    assert run_command("report", run) == 0
    assert (run / "report.html").is_file()


def test_a_workdir_of_another_config_shows_the_difference(finished, config_file, capsys):
    status = cli.main(
        ["train", "--config", str(config_file), "--workdir", str(finished), "--qat.epochs", "3"]
    )
    assert status == 2
    assert "qat.epochs: 2 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--qat.epoch", "1"], "--qat.epoch 1; the nearest right one is --qat.epochs"),
        (["--qat.epochs", "many"], '"qat.epochs"'),
        (["--precision", "fp16"], '"precision"'),
        (["--quant.weight_bits", "9"], "quant.weight_bits must be an integer in 2..8"),
        (["--fp32.epochs", "0"], "fp32.epochs must be 1 or more, got 0"),
        (["--fp32.batch_size", "101"], "fp32.batch_size must be at most the 100 training images"),
        (["--quant.rules", '[{"path": "haed"}]'], "matches none of"),
        (["--data.name", "no_such_set"], "no_such_set"),
    ],
)
def test_invalid_options_are_named_and_leave_no_folder(
    tmp_path, config_file, monkeypatch, capsys, arguments, message
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JAXQAT_CACHE_DIR", str(tmp_path / "cache"))
    run = tmp_path / "run"
    status = run_command("train", "--config", config_file, "--workdir", run, *arguments)
    err = capsys.readouterr().err
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qat: {epoch: 1}", "unknown key 'qat.epoch'; the nearest right one is 'qat.epochs'"),
        ("qat: {epochs: many}", '"qat.epochs"'),
        ("qat: {epochs: [", "is not YAML"),
        ("quant: {rules: [{path: '['}]}", "quant.rules.path must be a regular expression"),
        ("quant: {rules: [{path: null}]}", "quant.rules.path must be str, got null"),
        ("fp32: {epochs: null}", "fp32.epochs must be int, got null"),
        ("name: 2020-13-45", "name: cannot be read: month must be in 1..12"),
        (f"seed: {'9' * 5000}", "seed: cannot be read"),
        (f"seed: {'[' * 5000}{']' * 5000}", "0: is nested more than 16 deep"),
        ("model: {width: 100000000000000000000}", "model.width must be"),
        ("data: {image_size: 1000000}", "data.image_size must be at most 4096, got 1000000"),
        ("fp32: {epochs: 100000000000000000000}", "fp32.epochs must be at most 2**32"),
        ("fp32: {optimizer: {learning_rate: .inf}}", "fp32.optimizer.learning_rate must be finite"),
        ("seed: 1\nfp32: {epochs: 1, epochs: 2}", "fp32.epochs: occurs twice"),
        ("seed: !!python/object/apply:os.getcwd []", "seed: cannot be read: could not determine"),
    ],
)
def test_invalid_config_files_are_named_and_leave_no_folder(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert run_command("train", "--config", path, "--workdir", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "{tmp}/none.yaml", "--workdir", "{tmp}/run"],
        ["train"],
        ["evaluate", "{tmp}/none"],
        ["evaluate", "{tmp}/none", "--stage", "int8"],
        ["report", "{tmp}/none"],
        ["verify", "{tmp}/none", "--network", "ptq"],
        ["verify", "{tmp}/none", "--stage", "integer"],
        ["analyze", "{tmp}/none"],
        ["analyze", "{tmp}/none", "--images", "0"],
        ["quantize", "{tmp}/none"],
        ["quantize", "{tmp}/none", "--method", "qat"],
        ["quantize", "{tmp}/none", "--batches", "0"],
        ["export", "{tmp}/none", "--format", "onnx", "--output", "{tmp}/file"],
        ["export", "{tmp}/none", "--format", "tflite", "--output", "{tmp}/file"],
        ["lowering", "{tmp}/none", "--target", "cpu"],
        ["lowering", "--target", "sm_10"],
        ["lowering", "--target", "cpu", "--batch_size", "0"],
        ["convert"],
        [],
    ],
    ids=lambda arguments: "_".join(arguments[:2]) or "nothing",
)
def test_missing_and_unknown_arguments_exit_with_2(tmp_path, capsys, arguments):
    assert run_command(*(a.format(tmp=tmp_path) for a in arguments)) == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_exits_with_2(tmp_path, finished, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    for command in (("evaluate", run, "--stage", "qat"), ("analyze", run)):
        assert run_command(*command) == 2
        assert "there are no checkpoints of qat" in capsys.readouterr().err


def test_a_read_only_workdir_exits_with_2(open_tmp, capsys):
    run = open_tmp / "run"
    run.mkdir(mode=0o555)
    with without_privileges():
        status = cli.main(["train", "--config", "quickstart", "--workdir", str(run)])
    assert status == 2
    assert f"workdir {run}: cannot be written: Permission denied" in capsys.readouterr().err


def test_a_finished_run_is_evaluated_and_exported_from_a_read_only_folder(
    finished, open_tmp, monkeypatch, capsys
):
    monkeypatch.setattr("jaxqat.pipeline.networks.build_model", tiny_run.build_small)
    run, output = open_tmp / "run", open_tmp / "out"
    shutil.copytree(finished, run)
    output.mkdir()
    output.chmod(0o777)
    commands = (("evaluate", run), ("evaluate", run, "--stage", "qat"))
    export = ("export", run, "--format", "onnx", "--output")
    # First with all rights: not every user may read Python's own files, which are imported here.
    for command in (*commands, (*export, output / "first.onnx")):
        assert run_command(*command) == 0
    shutil.rmtree(run / "evaluations")
    capsys.readouterr()
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tiny_run.files(run)
    for command in commands:
        with without_privileges():
            assert run_command(*command) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "accuracy" in out
        assert "is read-only, so the result was not written to it." in out
    with without_privileges():
        assert run_command(*export, output / "second.onnx") == 0
    assert (output / "second.onnx").read_bytes() == (output / "first.onnx").read_bytes()
    assert tiny_run.files(run) == before


@pytest.mark.slow
def test_infinite_loss_exits_with_1(tmp_path, config_file):
    process = start(
        *("train", "--config", config_file, "--workdir", tmp_path / "run"),
        *("--fp32.optimizer.learning_rate", "3e38"),
    )
    status, _, err = finish(process)
    assert status == 1
    assert "fp32: the loss or its gradient became infinite or NaN in step 2, in epoch 1" in err
    assert "at learning rate 2.95e+38" in err
    assert "This stage has no checkpoint yet" in err
    assert "Traceback" not in err


def test_a_printed_config_can_be_loaded(tmp_path, config_file, capsys):
    arguments = ["train", "--config", str(config_file), "--qat.epochs", "7", "--print_config"]
    assert run_command(*arguments) == 0
    path = tmp_path / "printed.yaml"
    printed = yaml.safe_load(capsys.readouterr().out)
    for key in ("workdir", "from", "repair", "recipe", "quiet"):
        printed.pop(key, None)
    path.write_text(yaml.safe_dump(printed))
    expected = config.from_dict(SETTINGS)
    assert config.differences(expected, config.load(path)) == ["qat.epochs: 2 -> 7"]


def test_help_lists_settings_with_meaning_and_default(capsys):
    assert run_command("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--qat.epochs EPOCHS Passes over the training split" in text
    assert "default: 30)" in text
    assert "--data.name NAME" in text


def test_help_lists_every_command_with_the_first_line_of_its_docstring(capsys):
    assert run_command("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in parser.COMMANDS:
        summary = inspect.getdoc(load_command(name))
        assert summary is not None and f"{name} {summary.splitlines()[0]}" in text


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate"]], ids=" ".join)
def test_help_and_wrong_options_import_no_jax(arguments):
    code = f"""
import sys
from jaxqat.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
heavy = ("jax", "flax", "optax", "orbax", "aqt", "tensorflow_datasets", "matplotlib", "sklearn")
sys.exit(f"imported {{loaded}}" if (loaded := set(heavy) & set(sys.modules)) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--stage" in done.stdout or "usage" in done.stdout or "run folder" in done.stderr


@pytest.mark.parametrize("name", parser.COMMANDS)
def test_signatures_read_from_the_source_are_those_of_the_functions(name):
    function, read = load_command(name), signature(name)
    parameters = inspect.signature(function).parameters
    assert list(read.hints) == list(parameters)
    hints = typing.get_type_hints(function)
    assert read.hints == {parameter: hints[parameter] for parameter in parameters}
    assert read.defaults == {
        p.name: p.default for p in parameters.values() if p.default is not p.empty
    }
    assert read.doc == inspect.getdoc(function)


def test_targets_and_executors_of_lowering_are_all_that_there_are():
    hints = signature("lowering").hints
    assert typing.get_args(hints["target"]) == tuple(TARGETS)
    executors, none = typing.get_args(hints["executor"])
    assert typing.get_args(executors) == tuple(PLATFORMS) and none is type(None)


@pytest.mark.parametrize("name", parser.COMMANDS)
def test_help_of_a_command_describes_every_parameter_as_its_docstring_does(name, capsys):
    assert run_command(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    function = load_command(name)
    described = "".join(inspect.getdoc(function) or "").split("Args:")[1].split("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        sentence = described.split(f"    {parameter}: ")[1].split(".")[0]
        shown = parameter not in parser.SUPPLIED
        # The formatter breaks lines at hyphens.
        sentence, page = (" ".join(t.split()).replace("- ", "-") for t in (sentence, text))
        assert (sentence in page) is shown, parameter


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["evaluate"], "--stage {fp32,ptq,qat,integer}"),
        (["evaluate"], "(default: integer)"),
        (["verify"], "--stage {qat,ptq}"),
        (["analyze"], "(type: int, default: 1000)"),
        (["lowering"], "--target {cpu,sm_75,sm_80,sm_90,tpu_v5e,tpu_v6e}"),
        (["benchmark"], "[run]"),
        (["verify"], "Run folder. (required, type: Path)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_help_shows_choices_and_defaults(arguments, shown, capsys):
    assert run_command(*arguments, "--help") == 0
    assert shown in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("script", "command"), [("train", "train"), ("evaluate", "evaluate")])
def test_scripts_have_the_options_of_the_command(monkeypatch, capsys, script, command):
    path = ROOT / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    spec = importlib.util.spec_from_file_location("__main__", path)
    assert spec is not None and spec.loader is not None
    with pytest.raises(SystemExit) as stop:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert stop.value.code == 0
    ours = capsys.readouterr().out
    assert run_command(command, "--help") == 0
    assert ours == capsys.readouterr().out


def test_stops_and_failures_have_their_exit_statuses(monkeypatch, capsys, tmp_path):
    from jaxqat.pipeline.checkpoint import CheckpointError
    from jaxqat.pipeline.training import Stopped

    for error, status in (
        (Stopped(signal.SIGTERM), 143),
        (Stopped(signal.SIGINT), 130),
        (KeyboardInterrupt(), 130),
        (CheckpointError("disk full"), 1),
        (OSError("disk full"), 1),
    ):

        @functools.wraps(TRAIN)  # The options come from the signature.
        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(train, "train", fail)
        assert run_command("train", "--config", "quickstart", "--workdir", tmp_path) == status
        assert capsys.readouterr().err.startswith("jaxqat: ")


def test_a_printed_config_can_be_passed_as_config(tmp_path, capsys):
    config = ROOT / "configs/quickstart.yaml"
    assert run_command("train", "--config", config, "--qat.epochs", 7, "--print_config") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = ("train", "--config", printed, "--workdir", tmp_path / "run")
    # A warm-up longer than the 7 epochs of the file is refused after all keys are parsed.
    assert run_command(*again, "--qat.optimizer.warmup_epochs", 8) == 2
    assert "qat.optimizer.warmup_epochs must be below epochs (7)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train", "--workdir"),
        ("report", "the run folder"),
        ("export", "the run folder, --output, --format"),
        ("lowering", "--target"),
    ],
)
def test_a_missing_argument_is_named_as_on_the_command_line(command, missing, capsys):
    assert run_command(command) == 2
    error = capsys.readouterr().err
    assert missing in error and f"{command}." not in error


def test_train_without_a_config_starts_nothing_and_names_the_presets(tmp_path, finished, capsys):
    run = tmp_path / "run"
    assert run_command("train", "--workdir", run, "--seed", 1) == 2
    names = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
    assert f"train needs --config: the path of a YAML file, or the name of a preset ({names})" in (
        capsys.readouterr().err
    )
    assert not run.exists()
    assert run_command("train", "--workdir", finished) == 2
    assert f"pass --config {finished / 'config.yaml'}" in capsys.readouterr().err


def test_a_preset_is_the_config_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    for path in ("quickstart", ROOT / "configs" / "quickstart.yaml"):
        assert run_command("train", f"--config={path}", "--print_config") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "width: 8" in printed[0]
    assert run_command("train", "--config", "quickstar", "--workdir", "run") == 2
    assert "is neither a file nor one of the presets" in (err := capsys.readouterr().err)
    assert "the nearest one is quickstart" in err
    (tmp_path / "quickstart").write_text("seed: 7")  # A file of the same name comes first.
    assert run_command("train", "--config", "quickstart", "--print_config") == 0
    assert "seed: 7" in capsys.readouterr().out


def test_an_installed_package_has_its_presets_in_share(tmp_path, monkeypatch):
    folder = tmp_path / "share" / "jaxqat" / "configs"
    (tmp_path / "site-packages/configs").mkdir(parents=True)
    monkeypatch.setattr(presets, "CHECKOUT", tmp_path / "site-packages/configs")
    monkeypatch.setattr("sysconfig.get_path", lambda name: {"data": str(tmp_path)}[name])
    assert presets.presets() == {}
    shutil.copytree(ROOT / "configs", folder)
    assert presets.find_config("quickstart") == folder / "quickstart.yaml"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["data-files"] == {"share/jaxqat/configs": ["configs/*.yaml"]}
