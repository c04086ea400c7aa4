"""The tutorials in `scripts/` run to their end and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxqat

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(name: str, *options: object, folder: Path) -> str:
    """Return what a script prints."""
    command = [sys.executable, SCRIPTS / name, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_ends_with_an_onnx_file_of_the_verified_network(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    shown = run("custom_model.py", path, "--epochs", 3, folder=tmp_path)
    # 397 images of 3,152 codes: 2,128 of what layers and sums read, 1,024 of the term of the sum.
    assert "\n0 of 1,251,344 codes differ" in shown
    assert f"{path}: {path.stat().st_size:,} bytes" in shown


def test_post_training_quantization_keeps_the_accuracy(tmp_path):
    shown = run("ptq.py", folder=tmp_path)
    real, integer = (float(share) for share in re.findall(r": ([\d.]+)% of 397", shown))
    assert real > 85 and abs(real - integer) < 1.1  # Four images.
    # 397 images of 64 pixels, and of the results of both convolutions: 8 * 64 and 16 * 16 codes.
    assert f"\n0 of {397 * (64 + 8 * 64 + 16 * 16):,} codes differ" in shown
    graph = jaxqat.load(tmp_path / "digits_int8")
    assert f"\n{graph.size_bytes():,} bytes of weights" in shown


def test_fine_tuning_wins_back_what_two_bits_cost(tmp_path):
    shown = run("low_bits.py", "--epochs", 4, folder=tmp_path)
    found = re.findall(r"(w\da\d)_lsq: ([\d.]+)% calibrated, ([\d.]+)% fine-tuned", shown)
    assert [name for name, _, _ in found] == ["w4a4", "w2a2"]
    _, calibrated, tuned = found[1]
    assert float(tuned) > float(calibrated)
    assert len(re.findall(r"; 0 of [\d,]+ codes differ", shown)) == 2
