"""`jaxqat.load_run`: a run folder as Python objects."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import STEPS, tiny

import jaxqat
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.run.folder import RunFolderError

pytestmark = pytest.mark.slow

small_network, finished = tiny_run.small_network, tiny_run.finished
IMAGES = load_dataset(tiny().data).test.images


def test_the_parts_of_a_run_are_those_of_its_folder(finished, small_network):
    before = tiny_run.files(finished)
    run = jaxqat.load_run(str(finished))
    assert run.experiment == tiny()
    assert run.results.integer is not None and run.results.integer.step == STEPS
    labels = load_dataset(tiny().data).test.labels
    logits = np.asarray(run.predict(IMAGES))
    accuracy = run.results.integer.test.accuracy
    assert (logits.argmax(-1) == labels).mean() == pytest.approx(accuracy, abs=1e-12)
    assert run.classes == tuple("0123456789")
    assert run.network.metadata["step"] == STEPS
    # The restored model is the one that the network was converted from: every code is equal.
    check = jaxqat.verify(
        run.model, run.variables, graph=run.network, batches=[IMAGES],
        preprocess=run.normalize, train=False,
    )  # fmt: skip
    assert check.differing == 0 and check.codes > 0
    assert run.model.apply(run.variables, run.normalize(IMAGES), train=False).shape == (40, 10)
    assert tiny_run.files(finished) == before


def test_a_network_needs_neither_checkpoints_nor_data(finished, tmp_path, monkeypatch):
    ignored = shutil.ignore_patterns("checkpoints")
    folder = Path(shutil.copytree(finished, tmp_path / "run", ignore=ignored))
    expected = jaxqat.make_executor(jaxqat.load(finished / "ptq" / "int8"))(IMAGES)
    monkeypatch.setattr("jaxqat.pipeline.opened_run.load_dataset", None)
    run = jaxqat.load_run(folder, stage="ptq")
    np.testing.assert_array_equal(jax.device_get(run.predict(IMAGES)), expected)
    assert run.network.metadata["ptq"] == "int8"


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=f"{tmp_path}: is not a run folder"):
        jaxqat.load_run(tmp_path)


def test_without_the_extra_the_error_names_it_and_nothing_else_needs_it(tmp_path):
    code = """
import sys
for name in ("jsonargparse", "sklearn", "matplotlib", "jinja2"):
    sys.modules[name] = None  # As if it were not installed.
import jaxqat
try:
    jaxqat.load_run("run")
except jaxqat.MissingPackageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "load_run needs the packages of the command" in done.stdout
    assert "pip install" in done.stdout and "[train]" in done.stdout
