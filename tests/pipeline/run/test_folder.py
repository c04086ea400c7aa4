"""The run folder: one process, one experiment, atomic files."""

import dataclasses
import json
import os

import pytest
import tiny_run
from pipeline.report import made_up
from tiny_run import tiny, without_privileges

from jaxqat.pipeline.config import to_yaml
from jaxqat.pipeline.measurements import Evaluation
from jaxqat.pipeline.results import read
from jaxqat.pipeline.run.folder import (
    RunFolder,
    RunFolderError,
    check_config,
    claim,
)

open_tmp = tiny_run.open_tmp


def test_a_folder_is_created_and_locked_by_one_process_at_a_time(tmp_path):
    path = tmp_path / "runs" / "a"
    with claim(path) as folder:
        folder.config.write_text("")
        with (
            pytest.raises(RunFolderError, match=rf"another process .*\(process {os.getpid()}\)"),
            claim(path),
        ):
            pass
    with claim(path):
        pass
    assert [p.name for p in path.iterdir()] == ["config.yaml"]


def test_the_lock_ends_with_its_process(tmp_path):
    (tmp_path / ".lock").write_text("1")
    with claim(tmp_path):
        pass


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "runs" / "a"):
        raise ZeroDivisionError
    assert not (tmp_path / "runs").exists()
    # A folder that existed before stays.
    with claim(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_read_only_folder_is_an_error(open_tmp):
    (open_tmp / "run").mkdir()
    (open_tmp / "run").chmod(0o555)
    open_tmp.chmod(0o555)
    with without_privileges():
        with pytest.raises(RunFolderError, match=r"run: cannot be written: Permission denied"):
            claim(open_tmp / "run").__enter__()
        with pytest.raises(RunFolderError, match=r"new: cannot be made: Permission denied"):
            claim(open_tmp / "new").__enter__()


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be made"):
        claim(tmp_path / "file").__enter__()


def test_parts_of_a_run_without_a_config_are_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"holds metrics.jsonl but no config.yaml"):
        claim(tmp_path).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_error_for_another_config_lists_every_different_key(tmp_path):
    folder = RunFolder(tmp_path)
    check_config(folder, tiny())
    folder.config.write_text(to_yaml(tiny()))
    check_config(folder, tiny())
    (folder.checkpoints("fp32") / "6").mkdir(parents=True)
    check_config(folder, tiny())
    with pytest.raises(RunFolderError) as caught:
        check_config(folder, tiny(qat__epochs=5, fp32__optimizer__learning_rate=0.5))
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  fp32.optimizer.learning_rate: 0.1 -> 0.5", "  qat.epochs: 2 -> 5"]


def test_a_folder_without_a_checkpoint_may_get_another_config(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text(to_yaml(tiny()))
    folder.checkpoints("fp32").mkdir(parents=True)
    check_config(folder, tiny(qat__epochs=5))
    folder.results.write_text("{}")
    with pytest.raises(RunFolderError, match=r"belongs to another config"):
        check_config(folder, tiny(qat__epochs=5))


def test_epochs_after_a_step_are_removed_for_one_stage_only(tmp_path):
    folder = RunFolder(tmp_path)
    lines = [("fp32", 6), ("fp32", 12), ("qat", 6), ("qat", 12)]
    for stage, step in lines:
        folder.append_metrics({"stage": stage, "step": step})
    folder.truncate_metrics("qat", 6)
    assert [(r["stage"], r["step"]) for r in folder.read_metrics()] == lines[:3]
    folder.truncate_metrics("qat", 0)
    assert [(r["stage"], r["step"]) for r in folder.read_metrics()] == lines[:2]


def test_an_incomplete_line_of_a_killed_process_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    folder.append_metrics({"stage": "fp32", "step": 6})
    with folder.metrics.open("a") as file:
        file.write('{"stage": "fp')
    assert folder.read_metrics() == [{"stage": "fp32", "step": 6}]
    folder.truncate_metrics("fp32", 6)
    folder.append_metrics({"stage": "fp32", "step": 12})
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6, 12]


def test_a_file_that_cannot_be_replaced_stays_unchanged(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    before = made_up.evaluation()
    path = folder.write_evaluation("a", before)
    assert path is not None

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFolderError, match=r"a.json: cannot be written: No space left"):
        folder.write_evaluation("a", dataclasses.replace(before, step=13))
    assert read(path, Evaluation, error=RunFolderError) == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_without_config_is_not_a_run(tmp_path):
    with pytest.raises(RunFolderError, match=r"is not a run folder: it holds no config.yaml"):
        RunFolder(tmp_path).load_config()
    with pytest.raises(RunFolderError, match=r"nowhere: there is no such folder"):
        RunFolder(tmp_path / "nowhere").load_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "is missing"), ("{", "is not JSON"), ('{"nam": 1}', "nam: Results has no such field")],
    ids=["missing", "broken", "other"],
)
def test_results_that_cannot_be_read_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunFolderError, match=rf"results.json .*{message}"):
        RunFolder(tmp_path).read_results()
