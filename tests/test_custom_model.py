"""The README's example of a custom model runs to its end."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "scripts" / "custom_model.py"


def test_the_example_ends_with_an_onnx_file_of_the_verified_network(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    done = subprocess.run(
        [sys.executable, SCRIPT, path, "--epochs", "3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # 397 images of 3,152 codes: 2,128 of what layers and sums read, 1,024 of the term of the sum.
    assert "\n0 of 1,251,344 codes differ" in done.stdout
    assert f"{path}: {path.stat().st_size:,} bytes" in done.stdout
