"""A disk that takes no more data ends a run with one line, and leaves what was good."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import yaml

pytestmark = pytest.mark.slow

# Of one file: enough for the config, the metrics and small arrays, but not for a checkpoint.
LIMIT = 4096
CACHE = "JAX_COMPILATION_CACHE_DIR"


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tiny_run.SETTINGS))
    script = Path(tiny_run.__file__)
    # JAX would warn that its cache of programs cannot be written either.
    environment = {k: v for k, v in os.environ.items() if k != CACHE}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parent)}
    done = subprocess.run(
        [sys.executable, script, "train", "--config", config, "--workdir", run],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=limit_files,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    assert "a checkpoint could not be written" in lines[-1]
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr[:2000]
    assert not (run / "results.json").exists()
