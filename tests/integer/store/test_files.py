"""A file is replaced completely or not at all."""

import json
import os
from pathlib import Path

import pytest

from jaxqat.errors import ExportError
from jaxqat.integer._store.files import write_atomically, write_json


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x00\xff", b"\x00\xff"),
        ("Grüße\n", "Grüße\n".encode()),
        (lambda file: file.write(b"filled"), b"filled"),
    ],
    ids=["bytes", "text", "function"],
)
def test_a_file_gets_its_content_and_nothing_else_is_left(tmp_path, content, expected):
    path = tmp_path / "file"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == expected
    assert os.listdir(tmp_path) == ["file"]


def test_json_is_indented_and_ends_with_a_line_break(tmp_path):
    write_json(tmp_path / "file.json", {"accuracy": [0.5, None]})
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text) == {"accuracy": [0.5, None]}
    assert text.startswith('{\n "accuracy"') and text.endswith("}\n")


def test_readers_see_the_old_content_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_text()))
    write_atomically(path, "new")
    assert seen == ["old"]
    assert path.read_text() == "new"


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["fsync", "replace", "function"])
def test_a_failure_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        if broken != "function":
            patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, fail if broken == "function" else b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path):
    def interrupt(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupt)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [write_atomically, write_json])
def test_the_error_class_of_the_caller_names_path_and_reason(tmp_path, write):
    path = tmp_path / "none" / "file"
    with pytest.raises(ExportError) as caught:
        write(path, "content", error=ExportError)
    assert str(caught.value) == f"{path}: cannot be written: No such file or directory."
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_value_without_json_form_touches_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(Path(tmp_path / "file"), {"array": object()})
    assert os.listdir(tmp_path) == []
