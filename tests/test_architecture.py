"""The import rules, checked on the source: which part may import which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxqat
from jaxqat.integer.graph import NODE_KINDS

PACKAGE = Path(__file__).parent.parent / "jaxqat"

# The other parts that each part may import. The library comes first; it does not import the
# experiment (`pipeline`), the commands or the tools for developers.
PARTS: dict[str, set[str]] = {
    "quant": set(),
    "integer": {"quant"},
    "export": {"integer"},
    "analysis": {"quant", "integer"},
    "lowering": set(),
    "pipeline": {"quant", "integer", "export", "analysis"},
    "bench": {"quant", "integer", "export", "pipeline"},
    "commands": {"quant", "integer", "export", "analysis", "lowering", "pipeline", "bench"},
    "cli": {"quant", "integer", "export", "lowering", "pipeline", "bench", "commands"},
}
LIBRARY = ("quant", "integer", "export", "analysis")
# The folders and modules of a part, in order: each may import only those before it.
INSIDE = {
    "quant": (
        "recipe",
        "_trace",
        "_numerics",
        "_forms",
        "_plan",
        "_interpret",
        "_aqt",
        "_models",
        "aqt",
    ),
    "integer": (
        *(
            "_packing",
            "_nodes",
            "_islands",
            "_results",
            "_inputs",
            "graph",
            "_guard",
            "_visitor",
            "_float_visitor",
        ),
        *("_convert", "_execute", "_store", "_compare", "_verify", "_numpy_products", "_self_test"),
    ),
    "pipeline": (
        *("hashing", "machine", "terminal", "progress"),
        *("bounded_yaml", "bounded_json", "reading", "settings"),
        *("scores", "results", "measurements", "diagnosis"),
        *("data", "models", "metrics"),
        *("training", "checkpoint", "report"),
        *(
            "config",
            "networks",
            "evaluation",
            "run",
            "recipes",
            "compilation_choice",
            "damage",
            "sentinel",
            "stages",
            "display",
        ),
        "integer_networks",
        *("post_training", "takeover", "advice", "opened_run", "load_run"),
    ),
}
# Of the pipeline, independent modules import no others but the shared ones.
SHARED = (
    *("hashing", "machine", "terminal", "progress"),
    *("bounded_yaml", "bounded_json", "reading", "settings"),
    *("scores", "results", "measurements"),
)
INDEPENDENT = ("data", "models", "metrics", "training", "checkpoint", "report")
# Third-party packages that only the named parts import.
OWNERS = {
    "aqt": {"quant"},
    "qwix": {"bench"},
    "optax": {"pipeline.training"},
    "orbax": {"pipeline.checkpoint"},
    "tensorflow_datasets": {"pipeline.data"},
    "matplotlib": {"pipeline.report"},
    "jinja2": {"pipeline.report"},
    "tensorboardX": {"pipeline.run"},
    "sklearn": {"pipeline.metrics", "pipeline.data"},
    "jsonargparse": {"pipeline.config", "cli", "commands"},
    "rich": {"pipeline", "commands", "bench", "cli"},
    "onnx": {"export", "bench", "commands"},
    "onnxruntime": {"export", "bench", "commands"},
    "openvino": {"export"},
    "torch": {"bench"},
}
# Imported only when needed, and never by `import jaxqat`.
HEAVY = (
    "optax",
    "orbax",
    "tensorflow_datasets",
    "matplotlib",
    "jsonargparse",
    "sklearn",
    "tensorboardX",
)
OPTIONAL = ("onnx", "onnxruntime", "openvino", "torch")


# Functions that import the module named by their argument.
IMPORTERS = ("importlib.import_module", "library")


def module_of(path: Path) -> tuple[str, ...]:
    """Return ('quant', 'recipe') for jaxqat/quant/recipe.py."""
    return tuple(part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts)


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, at any place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
            yield node.module or ""
            if (node.module or "").count(".") < 2:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


SOURCES = sorted(PACKAGE.rglob("*.py"))
BY_NAME = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))


def of_jaxqat(path: Path) -> set[tuple[str, ...]]:
    names = (name.split(".") for name in imports(path))
    return {tuple(parts[1:]) for parts in names if parts[0] == "jaxqat" and len(parts) > 1}


def test_the_rules_cover_exactly_the_existing_modules():
    modules = {module_of(path) for path in SOURCES}
    assert set(PARTS) == {module[0] for module in modules} - {"__init__", "errors"}
    for part, inside in INSIDE.items():
        folders = {module[1] for module in modules if module[0] == part}
        assert set(inside) == folders - {"__init__"}, part


def test_the_package_has_at_most_twelve_entries():
    entries = [p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 12, sorted(entries)


@BY_NAME
def test_imports_go_down_only(path):
    part = module_of(path)[0]
    used = {module[0] for module in of_jaxqat(path)} - {"errors", "__version__"}
    if part == "__init__":
        assert used <= {*LIBRARY, "pipeline"}
        of_pipeline = {m[:2] for m in of_jaxqat(path) if m[0] == "pipeline" and len(m) > 1}
        assert of_pipeline == {("pipeline", "load_run")}  # It imports the rest when it is called.
    elif part != "errors":
        assert used <= {part} | PARTS[part]


@BY_NAME
def test_imports_inside_a_part_go_down_only(path):
    part, *rest = module_of(path)
    if part not in INSIDE or rest == ["__init__"]:
        return
    order, own = INSIDE[part], rest[0]
    used = {m[1] for m in of_jaxqat(path) if m[0] == part and len(m) > 1 and m[1] in order}
    later = {name for name in used if order.index(name) > order.index(own)}
    assert not later
    if part == "pipeline" and own in INDEPENDENT:
        assert used <= {own, *SHARED}


@BY_NAME
def test_third_party_packages_stay_with_their_owners(path):
    tops = {name.split(".")[0] for name in imports(path)}
    module = ".".join(module_of(path))
    for package, owners in OWNERS.items():
        if package in tops:
            assert any(module == o or module.startswith(f"{o}.") for o in owners), package


@BY_NAME
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_jaxqat_loads_nothing_heavy_and_starts_no_backend():
    script = f"""
import sys, jaxqat
assert "jax" not in sys.modules  # The command watches for signals before it imports JAX.
names = [n for n in jaxqat.__all__ if n not in ("export_onnx", "export_stablehlo")]
assert all(getattr(jaxqat, name) is not None for name in names)
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
loaded = sorted(set({HEAVY + OPTIONAL!r}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_command_starts_no_backend_and_needs_no_optional_package():
    script = f"""
import sys, jaxqat.cli.dispatch
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
loaded = sorted(set({OPTIONAL!r}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pyright_checks_the_public_surface_and_the_nodes_of_graphs_strictly():
    names = {name: getattr(jaxqat, name) for name in jaxqat.__all__ if name != "__version__"}
    names |= {kind.__name__: kind for kind in NODE_KINDS}
    owners = {name: getattr(x, "__module__", x.__name__) for name, x in names.items()}
    modules = {name: sys.modules[owner].__file__ for name, owner in owners.items()}
    basic = [
        name
        for name, file in modules.items()
        if file and not Path(file).read_text().startswith("# pyright: strict")
    ]
    assert not basic
