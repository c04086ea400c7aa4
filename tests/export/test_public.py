"""The public names of `jaxqat.export` are loaded on first use."""

import subprocess
import sys

import pytest

import jaxqat.export


def test_every_public_name_can_be_imported():
    pytest.importorskip("onnx")
    assert set(jaxqat.export._MODULES) == set(jaxqat.export.__all__)
    for name in jaxqat.export.__all__:
        assert getattr(jaxqat.export, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'export_tflite'"):
        jaxqat.export.export_tflite  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_loads_no_runtime():
    script = """
import sys
from jaxqat.export import export_onnx, run_onnx, load_onnx
assert not {"onnx", "onnxruntime", "openvino"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
