"""Readers of foreign files, fed with damaged ones: only the project's errors come out.

The examples are the same in every run. Each reader also meets files that were resealed after the
damage, so that no checksum hides what is behind it.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer import graphs
from pipeline.report.made_up import ENVIRONMENT, layer, scores

import jaxqat
from jaxqat.errors import ArtifactError, ExportError
from jaxqat.export._onnx.builder import digest
from jaxqat.export._onnx.model import onnx_model
from jaxqat.export._onnx.runtime import load_onnx
from jaxqat.export._stablehlo import _opened, _sealed, export_stablehlo, load_stablehlo
from jaxqat.integer._store.folder import load, save
from jaxqat.pipeline import config as configs
from jaxqat.pipeline import results
from jaxqat.pipeline.config import ConfigError
from jaxqat.pipeline.report import ReportError
from jaxqat.pipeline.results import Results, SizeBytes, Speed, StageResult

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD: list[Any] = [None, True, -1, 0, 7.5, 1e300, 2**40, 10**30, "", "x", "0x1p-3", [], {}, [[]]]
ODD += [float("nan"), {"a": 1}, "\ud800", "../../x", [0] * 9, {"batch": 10**12}]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every part of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def edited(value: Any, path: tuple, odd: Any) -> Any:
    """Return a JSON value with another part at a path; `...` removes it."""
    value = part = copy.deepcopy(value)
    for key in path[:-1]:
        part = part[key]
    if odd is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = odd
    return value


def edits(value: Any) -> st.SearchStrategy:
    return st.builds(
        lambda path, odd: edited(value, path, odd),
        st.sampled_from(list(places(value))),
        st.sampled_from([*ODD, ...]),
    )


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Return the content with a changed byte, or cut at one."""

    def damage(position: int, byte: int, cut: bool) -> bytes:
        rest = b"" if cut else content[position + 1 :]
        return content[:position] + bytes([byte]) + rest

    return st.builds(
        damage,
        st.integers(0, len(content) - 1),
        st.integers(0, 255),
        st.sampled_from([False, True]),
    )


def survives(read: Callable[[], Any], error: type[Exception], folder: Path) -> None:
    """Read; nothing but `error` may come out, and nothing may be written."""
    before = sorted(folder.rglob("*"))
    try:
        read()
    except error as raised:
        assert str(raised)
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(graphs.build("residual"), tmp_path_factory.mktemp("fuzz") / "net")


def seal(folder: Path) -> None:
    sums = (
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("graph.json", "arrays.npz")
    )
    (folder / "SHA256SUMS").write_text("".join(sums))


@FUZZ
@given(data=st.data())
def test_the_config_reader(data, tmp_path):
    good = configs.to_yaml(configs.Experiment())
    path = tmp_path / "config.yaml"
    text = st.text(st.characters(codec="utf-8") | st.sampled_from("[]{}:&*!-,\n '"), max_size=60)
    content = data.draw(
        damaged(good.encode())
        | text.map(str.encode)
        | edits(configs.to_dict(configs.Experiment())).map(lambda v: json.dumps(v).encode())
    )
    path.write_bytes(content)
    survives(lambda: configs.load(path), ConfigError, tmp_path)


@FUZZ
@given(data=st.data())
def test_the_reader_of_saved_networks(data, saved, tmp_path):
    folder = tmp_path / "net"
    folder.mkdir(exist_ok=True)
    for name in ("graph.json", "arrays.npz"):
        (folder / name).write_bytes((saved / name).read_bytes())
    graph = json.loads((saved / "graph.json").read_text())
    name = data.draw(st.sampled_from(["graph.json", "arrays.npz", "edit"]))
    if name == "edit":
        (folder / "graph.json").write_text(json.dumps(data.draw(edits(graph))))
    else:
        (folder / name).write_bytes(data.draw(damaged((saved / name).read_bytes())))
    seal(folder)
    survives(lambda: load(folder), ArtifactError, tmp_path)


@FUZZ
@given(data=st.data())
def test_the_reader_of_onnx_metadata(data, tmp_path):
    model = onnx_model(graphs.build("mlp"), input="uint8")
    entry = data.draw(st.sampled_from(list(model.metadata_props)))
    if entry.key == "sha256" or data.draw(st.booleans()):
        content = data.draw(damaged(model.SerializeToString()))
    else:
        value = json.loads(entry.value)
        entry.value = json.dumps(data.draw(edits(value))) if value else "["
        seal_ = next(e for e in model.metadata_props if e.key == "sha256")
        seal_.value = digest(model)
        content = model.SerializeToString()
    survives(lambda: load_onnx(content), ExportError, tmp_path)


@pytest.fixture(scope="module")
def stablehlo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "net.stablehlo"
    return export_stablehlo(graphs.build("mlp"), path, platforms=("cpu",))


@FUZZ
@given(data=st.data())
def test_the_reader_of_stablehlo(data, stablehlo, tmp_path):
    content = stablehlo.read_bytes()
    program, description = _opened(stablehlo, content)
    content = data.draw(
        damaged(content)
        | edits(description).map(lambda changed: _sealed(program, changed))
        | damaged(program).map(lambda changed: _sealed(changed, description))
    )
    path = tmp_path / "net"
    path.write_bytes(content)
    survives(lambda: load_stablehlo(path), ExportError, tmp_path)


@FUZZ
@given(data=st.data())
def test_the_reader_of_results(data, tmp_path):
    path, names = tmp_path / "results.json", ["a", "b", "c"]
    test = scores(names, 0.9, seed=1, per_class=5)
    good = Results(
        name="x",
        seed=0,
        precision="float32",
        config_hash="0",
        data={"name": "d"},
        environment=ENVIRONMENT,
        fp32=StageResult(test=test, epochs=1, train_seconds=1.0),
        parameters=1,
        macs=1,
        size_bytes=SizeBytes(fp32=4),
        layers=(layer(),),
        speed={"fp32": Speed(evaluate_images_per_s=1.0)},
    )
    value = results.to_json(good)
    change = edits(value).map(lambda changed: json.dumps(changed).encode())
    path.write_bytes(data.draw(damaged(json.dumps(value).encode()) | change))
    survives(lambda: results.read(path, Results, error=ReportError), ReportError, tmp_path)


BOUNDED = """
import resource, sys
import jaxqat
from pathlib import Path
from jaxqat.pipeline import config
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
folder = Path(sys.argv[1])
for place in sorted(folder.iterdir()):
    try:
        config.load(place) if place.suffix == ".yaml" else jaxqat.load(place)
    except (config.ConfigError, jaxqat.JaxqatError) as error:
        print(place.name, type(error).__name__)
"""


def test_malicious_files_run_no_code_write_nothing_and_take_little_memory(saved, tmp_path):
    """Each attack is read in one process that may take 512 MiB more than it has."""
    folder, trap = tmp_path / "attacks", tmp_path / "trap"
    folder.mkdir()
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 13))
    (folder / "bomb.yaml").write_text("a0: &a0 [x]\n" + levels)
    (folder / "object.yaml").write_text(f"name: !!python/object/apply:os.mkdir ['{trap}']\n")
    (folder / "nested.yaml").write_text("seed: " + "[" * 10**5)
    with (folder / "sparse.yaml").open("wb") as file:
        file.truncate(2**40)
    names = zipfile.ZipFile(saved / "arrays.npz").namelist()
    pickle = b"cos\nmkdir\n(S'" + os.fsencode(trap) + b"'\ntR."
    header = b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': ()}"
    huge = b"\x93NUMPY\x01\x00\x60\x00{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}"
    attacks: dict[str, tuple[list[tuple[str, bytes]], int]] = {
        "pickle": ([(n, header.ljust(73) + b"\n" + pickle) for n in names], 0),
        "traversal": ([("../../trap", b"x"), *[(n, b"") for n in names]], 0),
        "huge_header": ([(n, (huge % 2**45).ljust(105) + b"\n") for n in names], 0),
        "inflated": ([(n, bytes(2**28)) for n in names[:1]], zipfile.ZIP_DEFLATED),
    }
    for name, (members, compression) in attacks.items():
        place = folder / name
        place.mkdir()
        (place / "graph.json").write_bytes((saved / "graph.json").read_bytes())
        with zipfile.ZipFile(place / "arrays.npz", "w", compression) as archive:
            for member, content in members:
                archive.writestr(member, content)
        seal(place)
    everything = sorted(tmp_path.rglob("*"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, folder], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()}
    assert kinds == {
        **dict.fromkeys(("bomb.yaml", "object.yaml", "nested.yaml", "sparse.yaml"), "ConfigError"),
        **dict.fromkeys(attacks, "ArtifactError"),
    }
    assert sorted(tmp_path.rglob("*")) == everything


def test_the_fuzzed_files_are_read_when_they_are_whole(saved, stablehlo):
    assert jaxqat.load(saved).nodes
    assert load_stablehlo(stablehlo).description["inputs"][0]["dtype"] == "float32"
    assert load_onnx(onnx_model(graphs.build("mlp")).SerializeToString()).graph.node
