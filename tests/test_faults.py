"""Faults that the real command survives, or ends from with one clear line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads exit statuses"),
]

ROOT = Path(__file__).parents[1]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a process that finds jaxqat and the tests' modules."""
    paths = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **changes}


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_an_uninterrupted_one(tmp_path):
    """One round of the soak, whose 200 cycles are in the README's table."""
    path = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, "-m", "soak", "--cycles", "1", "--results", path],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert (content["rounds"], content["problems"]) == (1, [])
    tries = {name: entry["tries"] for name, entry in content["faults"].items()}
    assert sum(tries[name] for name in soak.KILLS) >= 6
    assert tries[soak.CLOCK] + tries[soak.CACHE_CUT] + tries[soak.NO_CACHE] == 2


def test_the_soak_notices_a_run_with_another_end(tmp_path):
    expected = {"fp32": {"model": {"a": 1}}, "results.json": {"x": [{"seconds": 1, "y": 2}]}}
    same = {"fp32": {"model": {"a": 1}}, "results.json": {"x": [{"seconds": 9, "y": 2}]}}
    found = [{k: soak.without_times(v) for k, v in each.items()} for each in (expected, same)]
    assert soak.differing(*found) == []
    found[1]["fp32"]["model"]["a"] = 2
    assert soak.differing(*found) == ["fp32"]
    assert soak.differing(found[0], {}) != []


def test_the_readme_has_the_table_that_the_soak_wrote():
    content, readme = json.loads(soak.RESULTS.read_text()), (ROOT / "README.md").read_text()
    kills = sum(content["faults"][name]["tries"] for name in soak.KILLS)
    assert soak.markdown(content) in readme
    assert f"({kills} kills and stops" in readme
    assert content["problems"] == []


@pytest.mark.parametrize("behaviour", ["refuses", "hangs"])
def test_a_download_without_a_network_ends_with_one_line(tmp_path, behaviour):
    """The proxy refuses connections, or takes them and says nothing."""
    command = ["train", "--config", "cifar10_narrow", "--data.download", "true"]
    command += ["--workdir", str(tmp_path / "run")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        if behaviour == "refuses":
            server.close()
        done = subprocess.run(
            [sys.executable, "-m", "jaxqat.cli", *command],
            capture_output=True,
            text=True,
            timeout=120,  # Importing takes most of it; ten seconds are the limit for the network.
            env=environment(
                TFDS_DATA_DIR=str(tmp_path / "tfds"),
                JAXQAT_CACHE_DIR=str(tmp_path / "cache"),
                **{name: proxy for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")},
                **{name: "" for name in ("no_proxy", "NO_PROXY")},
            ),
        )
    assert done.returncode == 2, done.stderr
    assert "cannot download from https://www.cs.toronto.edu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
