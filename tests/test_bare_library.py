"""The library needs none of the extras: a script runs with their packages blocked."""

import subprocess
import sys
from pathlib import Path

import bare_library
import pytest

pytestmark = pytest.mark.slow

# Flax imports orbax-checkpoint and optax; test_architecture.py checks that jaxqat does not.
BLOCKED = """
import sys, runpy
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
runpy.run_path({script!r}, run_name="__main__")
"""


def test_the_library_quantizes_trains_converts_and_verifies_without_the_extras():
    script = str(Path(bare_library.__file__))
    code = BLOCKED.format(names=set(bare_library.EXTRAS), script=script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the bare library works" in done.stdout
