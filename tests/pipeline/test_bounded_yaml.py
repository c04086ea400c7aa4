"""Settings in YAML: bounds on size, depth and aliases, and dotted keys in errors."""

import os
import subprocess
import sys

import pytest

from jaxqat.pipeline import config as configs
from jaxqat.pipeline.bounded_yaml import MAX_BYTES, MAX_DEPTH, SettingsError, parse
from jaxqat.pipeline.config import ConfigError

BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 13)
)


def test_a_plain_document_is_what_the_safe_loader_returns():
    text = "a: [1, 2.5, null, true]\nb: &b {c: d}\ne: *b\nf: {<<: *b, g: 1}\n"
    assert parse(text) == {
        "a": [1, 2.5, None, True],
        "b": {"c": "d"},
        "e": {"c": "d"},
        "f": {"c": "d", "g": 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "a4: stands for more than 10,000 values"),
        ("a: &a [*a]", "a.0: refers to a part that it is in"),
        ("a: {b: &b {c: *b}}", "a.b.c: refers to a part that it is in"),
        ("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "is nested more than 16 deep"),
        ("{a: " * 3000 + "}" * 3000, "is nested more than 16 deep"),
        ("a: {b: 1, c: 2, b: 3}", "a.b: occurs twice"),
        ("a: " + "9" * 5000, "a: cannot be read: Exceeds the limit"),
        ("a: [1, 2020-13-45]", "a.1: cannot be read: month must be in 1..12"),
        ("a: {b: !!python/name:os.system }", "a.b: cannot be read: could not determine"),
        ("a: {[1]: 2}", "a: cannot be read: found unhashable key"),
        ("x" * (MAX_BYTES + 1), "more than 1,048,576"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("a: \0", "is not YAML"),
    ],
)
def test_what_is_no_plain_bounded_document_is_refused(text, message):
    with pytest.raises(SettingsError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_a_bomb_of_aliases_takes_little_memory(tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMB)
    script = f"""
from pathlib import Path
import jaxqat.pipeline.config as configs
import resource
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    configs.load(Path({str(path)!r}))
except configs.ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"{path}: a4: stands for more than 10,000 values" in done.stdout, done.stderr[-2000:]


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe.yaml")
    with (sparse := tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "folder.yaml").mkdir()
    for path, reason in [
        (pipe, "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (sparse, "larger than"),
        (tmp_path / "folder.yaml", "not a regular file"),
    ]:
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: .*{reason}"):
            configs.load(type(tmp_path)(path))
