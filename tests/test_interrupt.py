"""Ctrl-C ends the real command, in a process of its own, at once and with the exit status 130."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_run

from jaxqat.pipeline.config import to_yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

ROOT = Path(__file__).parent.parent
REAL = [sys.executable, "-m", "jaxqat.cli"]
# The command with a small network; it has imported everything before it starts.
SMALL = [sys.executable, str(ROOT / "tests" / "tiny_run.py")]
# Far longer than the process needs, and far shorter than what it was doing: these machines are
# shared, and import or compilation take ten seconds and more.
PROMPT = 5.0
finished = tiny_run.finished


def start(command: list[str], *arguments: object) -> subprocess.Popen[str]:
    """Start a command that compiles everything anew."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def wait_until_watched(process: subprocess.Popen[str]) -> None:
    """Wait until the process handles SIGTERM, which Python itself does not."""
    status = Path(f"/proc/{process.pid}/status")
    while True:
        assert process.poll() is None, process.communicate()
        caught = next(line for line in status.read_text().splitlines() if "SigCgt" in line)
        if int(caught.split()[1], 16) & 1 << signal.SIGTERM - 1:
            return
        time.sleep(0.01)


def interrupted(process: subprocess.Popen[str], signum: int = signal.SIGINT) -> str:
    """Send a signal; check that it ends the process at once; return what it wrote to stderr."""
    assert process.poll() is None, process.communicate()
    start = time.monotonic()
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < PROMPT
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("seconds", [0, 0.3])
@pytest.mark.parametrize("command", ["verify", "analyze", "evaluate", "report"])
def test_while_it_imports(tmp_path, command, seconds):
    process = start(REAL, command, tmp_path)
    wait_until_watched(process)
    time.sleep(seconds)
    assert interrupted(process) == "jaxqat: interrupted.\n"


@pytest.mark.parametrize("seconds", [0, 0.5])
@pytest.mark.parametrize("command", ["verify", "analyze"])
def test_while_it_traces_and_compiles(finished, command, seconds):
    process = start(SMALL, command, finished)
    assert process.stdout is not None
    assert any("images" in line for line in process.stdout)  # What it is about to do.
    time.sleep(seconds)
    assert interrupted(process) == "jaxqat: interrupted.\n"
    assert not list(finished.glob("evaluations/verify*"))


def test_train_while_it_compiles_its_first_step(tmp_path):
    """Nothing is trained yet; the signal must not wait for the compiler."""
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_run.tiny()))
    process = start(SMALL, "train", "--config", config, "--workdir", tmp_path / "run")
    assert process.stdout is not None
    assert any("compiling" in line for line in process.stdout)
    assert interrupted(process) == "jaxqat: interrupted. Run the same command to resume.\n"
    assert not list((tmp_path / "run/checkpoints/fp32").glob("[0-9]*"))


def test_quantize_while_it_calibrates_changes_nothing(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = tiny_run.files(run)
    process = start(SMALL, "quantize", run)
    assert process.stdout is not None
    assert any("calibrating" in line for line in process.stdout)
    assert interrupted(process) == "jaxqat: interrupted.\n"
    after = tiny_run.files(run)
    after.pop(".lock", None)  # Of a dead process: the next command takes it over.
    assert after == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_quantize_while_it_converts_changes_nothing(finished, tmp_path, signum):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = tiny_run.files(run)
    process = start(SMALL, "quantize", run)
    assert process.stdout is not None
    assert any("converting to integers" in line for line in process.stdout)
    verb = "interrupted" if signum == signal.SIGINT else "terminated"
    assert interrupted(process, signum) == f"jaxqat: {verb}.\n"
    after = tiny_run.files(run)
    after.pop(".lock", None)
    assert after == before


def test_export_leaves_no_part_of_a_file(finished, tmp_path):
    process = start(
        *(SMALL, "export", finished, "--format", "stablehlo"),
        *("--output", tmp_path / "network.stablehlo"),
    )
    assert process.stdout is not None
    assert any("writing" in line for line in process.stdout)
    time.sleep(0.1)
    assert interrupted(process) == "jaxqat: interrupted.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["integer", "qat"])
def test_while_it_evaluates(finished, stage):
    process = start(SMALL, "evaluate", finished, "--stage", stage)
    wait_until_watched(process)
    time.sleep(0.1)  # The small network is compiled and evaluated in less than a second.
    assert interrupted(process) == "jaxqat: interrupted.\n"


def test_sigterm_ends_it_with_143(tmp_path):
    process = start(REAL, "verify", tmp_path)
    wait_until_watched(process)
    assert interrupted(process, signal.SIGTERM) == "jaxqat: terminated.\n"


def script(body: str) -> subprocess.Popen[str]:
    """Start Python code in which signals end the process."""
    lines = ["    " + line for line in body.strip().splitlines()]
    head = ["import hashlib, os, signal, time", "from jaxqat.cli import exit_on_signals"]
    return start([sys.executable, "-c", "\n".join([*head, "with exit_on_signals():", *lines])])


def test_a_call_that_python_cannot_interrupt_ends_too():
    """As the compilation of a program: no handler of Python's runs before it returns."""
    process = script("hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")
    wait_until_watched(process)
    time.sleep(0.5)
    assert interrupted(process) == "jaxqat: interrupted.\n"


def test_a_run_that_saves_its_state_gets_the_first_signal_and_not_the_second():
    process = script("""
from jaxqat.pipeline.training.stop import stop_on_signals
with stop_on_signals() as stop:
    stop.listen()
    print('ready', flush=True)
    while stop.signum is None:
        time.sleep(0.01)
    print('saving', flush=True)
    time.sleep(60)
""")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    time.sleep(0.5)  # The first signal has no effect later either.
    assert interrupted(process) == "jaxqat: interrupted.\n"


def test_handlers_and_threads_are_as_before_after_the_command(tmp_path):
    before = signal.getsignal(signal.SIGINT), threading.active_count()
    assert tiny_run.run_command("report", tmp_path) == 2
    for _ in range(100):
        if threading.active_count() == before[1]:
            break
        time.sleep(0.01)
    assert (signal.getsignal(signal.SIGINT), threading.active_count()) == before
