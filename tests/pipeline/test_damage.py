"""Damaged checkpoints of a finished run: they are named, and `train --repair` trains again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from tiny_run import STEPS, STEPS_PER_EPOCH, run_command, tiny

from jaxqat.commands import analyze, evaluate, train, verify
from jaxqat.pipeline.checkpoint import DamagedCheckpointError
from jaxqat.pipeline.config import to_yaml
from jaxqat.pipeline.run.folder import RunFolder

pytestmark = pytest.mark.slow

small_network, no_report = tiny_run.small_network, tiny_run.no_report
console, finished = tiny_run.console, tiny_run.finished


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def arrays(run: Path) -> list[dict]:
    """Return the SHA-256 of all arrays at the end of both stages."""
    paths = [run / "checkpoints" / s / str(STEPS) / "info" / "metadata" for s in ("fp32", "qat")]
    return [json.loads(path.read_text())["arrays"] for path in paths]


def truncate(checkpoint: Path) -> None:
    for path in checkpoint.rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-40])


def leave_incomplete(checkpoint: Path) -> None:
    """As a writer that was killed, before it renamed its folder: Orbax does not list it."""
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.orbax-checkpoint-tmp"))


@pytest.mark.parametrize("damage", [truncate, leave_incomplete])
@pytest.mark.parametrize("stage", ["fp32", "qat"])
def test_a_finished_run_with_a_damaged_checkpoint_is_not_called_finished(
    run, finished, small_network, no_report, console, damage, stage
):
    ptq = RunFolder(run).read_results().ptq
    damage(run / "checkpoints" / stage / str(STEPS))
    wanted = rf"{stage}/{STEPS} is damaged: .*train --repair --config {run}/config.yaml --workdir"
    with pytest.raises(DamagedCheckpointError, match=rf"(?s){wanted} {run}"):
        train.train(tiny(), run, console=console)
    train.train(tiny(), run, repair=True, console=console)
    shown = console.file.getvalue()
    assert f"{stage}/{STEPS} is damaged" in shown
    assert f"{stage}: resumed at step {STEPS_PER_EPOCH} of {STEPS}" in shown
    assert arrays(run) == arrays(finished)
    assert RunFolder(run).read_results().ptq == ptq
    # Nothing is left to repair.
    train.train(tiny(), run, repair=True, console=console)
    assert "no checkpoint is damaged" in console.file.getvalue()
    assert "this run is finished" in console.file.getvalue()


def test_a_run_without_checkpoints_is_finished(run, small_network, console):
    shutil.rmtree(run / "checkpoints")
    train.train(tiny(), run, console=console)
    assert "this run is finished" in console.file.getvalue()


def test_verify_and_analyze_compare_only_what_was_converted(run, small_network, console):
    leave_incomplete(run / "checkpoints" / "qat" / str(STEPS))
    wanted = rf"qat/{STEPS} is damaged: .* of step {STEPS_PER_EPOCH}, is another .*train --repair"
    for command in (verify.verify, analyze.analyze):
        with pytest.raises(DamagedCheckpointError, match=rf"(?s){wanted}"):
            command(run, console=console)
    leave_incomplete(run / "checkpoints" / "fp32" / str(STEPS))
    with pytest.raises(DamagedCheckpointError, match=rf"(?s)fp32/{STEPS} is damaged"):
        verify.verify(run, stage="ptq", console=console)
    assert evaluate.evaluate(run, console=console).step == STEPS  # It needs no checkpoint.


def damaged_network(run: Path) -> None:
    path = run / "integer" / "arrays.npz"
    path.write_bytes(path.read_bytes()[:-1])


def damaged_results(run: Path) -> None:
    path = run / "results.json"
    path.write_text(path.read_text()[:-10])


@pytest.mark.parametrize(
    ("damage", "command"),
    [
        (lambda run: truncate(run / "checkpoints" / "qat" / str(STEPS)), "verify"),
        (lambda run: leave_incomplete(run / "checkpoints" / "qat" / str(STEPS)), "verify"),
        (damaged_network, "verify"),
        (damaged_network, "evaluate"),
        (damaged_results, "train"),
    ],
)
def test_damage_of_any_kind_has_the_exit_status_1(run, small_network, tmp_path, damage, command):
    damage(run)
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(tiny()))
    options = ("--config", config, "--workdir", run) if command == "train" else (run,)
    assert run_command(command, *options) == 1


def test_a_truncated_checkpoint_is_one_line_and_no_tracebacks(run):
    truncate(run / "checkpoints" / "qat" / str(STEPS))
    code = f"""
import time
from pathlib import Path
from jaxqat.pipeline.checkpoint import CheckpointStore
from jaxqat.pipeline.settings.checkpoint import CheckpointConfig
from jaxqat.pipeline.checkpoint.manifest import dictionary
store = CheckpointStore(Path({str(run)!r}) / "checkpoints" / "qat", CheckpointConfig())
target = dictionary(store._info({STEPS})["arrays"]["model"])
print(store.restore_newest_good({{"model": target}}).step)
time.sleep(1)  # The reports come late.
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{STEPS_PER_EPOCH}\n", done.stderr
    assert f"{STEPS} is damaged" in done.stderr
    assert "Event loop" not in done.stderr and "Traceback" not in done.stderr
