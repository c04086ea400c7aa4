"""The import rules: who may know whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxqat"

# The parts, each with the others that it may know.
PARTS: dict[str, set[str]] = {
    "quant": set(),
    "models": set(),
    "data": set(),
    "metrics": set(),
    "training": set(),
    "checkpoint": set(),
    "report": set(),
    "lowering": set(),
    "integer": {"quant"},
    "export": {"integer"},
    "analysis": {"quant"},
}
# Third-party packages that only the named parts import.
OWNERS = {
    "aqt": {"quant"},
    "optax": {"training"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "sklearn": {"metrics", "data"},
    "jsonargparse": {"config", "cli"},
    "onnx": {"export", "benchmark"},
    "onnxruntime": {"export", "benchmark"},
    "openvino": {"export"},
    "torch": {"benchmark"},
}
# What composes the parts; each knows all parts and what stands before it. `cli` is on top.
LAYERS = ("config", "runfolder", "networks", "evaluation", "results", "snapshots", "stages")
LAYERS = (*LAYERS, "display", "conversion", "post_training", "benchmark", "deployment", "diagnosis")
LAYERS = (*LAYERS, "takeover", "experiment", "cli")
# Loaded by what needs them, when it needs them, and never by `import jaxqat`.
HEAVY = ("optax", "orbax", "tensorflow_datasets", "matplotlib", "jsonargparse", "sklearn")
OPTIONAL = ("onnx", "onnxruntime", "openvino", "torch")


# Functions that import what their argument names.
IMPORTERS = ("importlib.import_module", "library")


def module_of(path: Path) -> str:
    """'quant' for jaxqat/quant/ops.py, 'config' for jaxqat/config.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
            yield node.module or ""
            if node.module == "jaxqat":
                yield from (f"jaxqat.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


SOURCES = sorted(PACKAGE.rglob("*.py"))
BY_NAME = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))


def of_jaxqat(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "jaxqat" and len(parts) > 1}


def test_the_rules_are_about_modules_that_exist():
    existing = {module_of(path) for path in SOURCES}
    assert {*PARTS, *LAYERS} == existing - {"__init__"}


@BY_NAME
def test_imports_go_down_only(path):
    module, used = module_of(path), of_jaxqat(path)
    if module == "__init__":
        assert used <= {"quant", "integer", "analysis"}
    elif module in PARTS:
        assert used <= {module} | PARTS[module]
    else:
        assert used <= {module, *PARTS, *LAYERS[: LAYERS.index(module)]}


@BY_NAME
def test_third_party_packages_stay_with_their_owners(path):
    tops = {name.split(".")[0] for name in imports(path)}
    for package, owners in OWNERS.items():
        assert package not in tops or module_of(path) in owners


@BY_NAME
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_jaxqat_loads_nothing_heavy_and_starts_no_backend():
    script = f"""
import sys, jaxqat
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
loaded = sorted(set({HEAVY + OPTIONAL!r}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_command_starts_no_backend_and_needs_no_optional_package():
    script = f"""
import sys, jaxqat.cli
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
loaded = sorted(set({OPTIONAL!r}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
