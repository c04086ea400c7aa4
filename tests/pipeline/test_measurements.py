"""The files of `evaluate`, `verify` and `analyze`: written and read again, or refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest
from pipeline.report import made_up

from jaxqat.pipeline.measurements import Comparison, Evaluation, RunAnalysis
from jaxqat.pipeline.results import read, write
from jaxqat.pipeline.run.folder import RunFolderError

MADE_UP = {
    Evaluation: made_up.evaluation,
    Comparison: made_up.comparison,
    RunAnalysis: made_up.analysis,
}
of_each_file = pytest.mark.parametrize("of", MADE_UP, ids=lambda of: of.__name__)
RESULTS = Path(__file__).parents[2] / "configs/results"
COMMITTED = sorted(RESULTS.glob("*/evaluations/verify_*.json"))


@of_each_file
def test_what_is_written_is_what_is_read(tmp_path, of):
    path, written = tmp_path / "file.json", MADE_UP[of]()
    write(path, written, error=RunFolderError)
    assert read(path, of, error=RunFolderError) == written


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_comparisons_of_the_repository_are_read(path):
    found, content = read(path, Comparison, error=RunFolderError), json.loads(path.read_text())
    assert (found.name, found.of) == (path.parents[1].name, content["of"])
    assert (found.codes, found.top1_flips) == (content["codes"], content["top1_flips"])
    assert len(found.tensors) == len(content["tensors"])


def test_the_repository_has_comparisons():
    assert {path.name for path in COMMITTED} >= {
        "verify_onnx_test.json",
        "verify_openvino_test.json",
    }


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        (Evaluation, lambda c: c.pop("name"), "name: is missing"),
        (Evaluation, lambda c: c.update(stage="int8"), "stage: must be one of fp32, ptq, qat"),
        (Evaluation, lambda c: c.update(split="all"), "split: must be one of test, train"),
        (Evaluation, lambda c: c.update(accuracy=1), "accuracy: Evaluation has no such field"),
        (Evaluation, lambda c: c["metrics"].update(f1=None), r"metrics\.f1: must be a number"),
        (
            Evaluation,
            lambda c: c["metrics"]["confusion_matrix"].pop(),
            "confusion_matrix must be 10 lists of 10 counts",
        ),
        (Comparison, lambda c: c.pop("of"), "of: is missing"),
        (Comparison, lambda c: c["environment"].pop("jax"), r"environment\.jax: is missing"),
        (
            Comparison,
            lambda c: c["tensors"][1].update(codes=0.5),
            r"tensors\[1\]\.codes: must be a whole number",
        ),
        (RunAnalysis, lambda c: c.update(step="12"), "step: must be a whole number"),
        (RunAnalysis, lambda c: c.update(stage="fp32"), "stage: must be one of qat, ptq"),
        (RunAnalysis, lambda c: c["quantized"].pop("sqnr_db"), r"quantized\.sqnr_db: is missing"),
        (
            RunAnalysis,
            lambda c: c["tensors"][0]["edges"].append("wide"),
            r"tensors\[0\]\.edges\[97\]: must be a number",
        ),
        (
            RunAnalysis,
            lambda c: c["sensitivity"][2]["alone"].update(accuracy="high"),
            r"sensitivity\[2\]\.alone\.accuracy: must be a number",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(tmp_path, of, change, message):
    path = tmp_path / "file.json"
    write(path, MADE_UP[of](), error=RunFolderError)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RunFolderError, match=rf"file\.json is broken: {message}"):
        read(path, of, error=RunFolderError)


@pytest.mark.parametrize(
    ("of", "command"), [(Evaluation, "evaluate"), (Comparison, "verify"), (RunAnalysis, "analyze")]
)
def test_a_missing_file_is_named_with_the_command_that_writes_it(tmp_path, of, command):
    with pytest.raises(RunFolderError, match=rf"file\.json is missing: `jaxqat {command}` writes"):
        read(tmp_path / "file.json", of, error=RunFolderError)


@of_each_file
def test_a_file_that_is_cut_short_is_named(tmp_path, of):
    path = tmp_path / "file.json"
    write(path, MADE_UP[of](), error=RunFolderError)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunFolderError, match=r"file\.json is not JSON"):
        read(path, of, error=RunFolderError)


def test_a_value_of_another_type_is_not_written(tmp_path):
    path, wrong = tmp_path / "file.json", made_up.effect(float("nan"))
    analysis = dataclasses.replace(made_up.analysis(), real=wrong)
    message = r"file\.json: cannot be written: real\.sqnr_db: must be a finite number, got nan"
    with pytest.raises(RunFolderError, match=message):
        write(path, analysis, error=RunFolderError)
    assert not path.exists()
