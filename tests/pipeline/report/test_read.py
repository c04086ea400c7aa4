import json

import pytest

from jaxqat.pipeline.report.files import ReportError
from jaxqat.pipeline.report.read import read_run


def edit_results(workdir, change):
    path = workdir / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "config.yaml"])
def test_missing_file_is_named(write_run, name):
    workdir = write_run()
    (workdir / name).unlink()

    with pytest.raises(ReportError, match=f"{name} is missing"):
        read_run(workdir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", b'{"name": "x", "fp', r"results\.json is not JSON"),
        ("results.json", b"[]", r"results\.json is broken: the content: must be an object"),
        ("results.json", b"\xff\xfe", r"results\.json cannot be read"),
        ("metrics.jsonl", b'{"stage": "fp32", "ep', r"metrics\.jsonl, line 1 is not JSON"),
        ("metrics.jsonl", b'\n{"stage": "fp32"}\n', "line 2 must hold stage, epoch"),
        ("metrics.jsonl", b"", r"metrics\.jsonl is broken: holds no epoch"),
        ("config.yaml", b"a: [", r"config\.yaml: is not YAML"),
        ("config.yaml", b"- a", r"config\.yaml: must hold settings"),
        ("report_data.npz", b"PK\x03\x04", r"report_data\.npz is broken"),
        ("report_data.npz", b"", r"report_data\.npz is broken"),
    ],
)
def test_broken_file_is_named_with_its_problem(write_run, name, content, message):
    workdir = write_run()
    (workdir / name).write_bytes(content)

    with pytest.raises(ReportError, match=message):
        read_run(workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("name"), "name: is missing"),
        (lambda r: r.pop("fp32"), "fp32: is missing"),
        (lambda r: r["fp32"].pop("test"), r"fp32\.test: is missing"),
        (lambda r: r["qat"]["test"].pop("f1"), r"qat\.test\.f1: is missing"),
        (lambda r: r["qat"].update(calibrated={}), r"qat\.calibrated: StageResult has no such"),
        (
            lambda r: r["fp32"]["test"]["per_class"][0].pop("support"),
            r"fp32\.test\.per_class\[0\]\.support: is missing",
        ),
        (
            lambda r: r["fp32"]["test"]["confusion_matrix"].pop(),
            "confusion_matrix must be 10 lists of 10 counts",
        ),
        (
            lambda r: r["qat"].update(
                test=r["qat"]["test"] | {"per_class": [], "confusion_matrix": []}
            ),
            "different numbers of classes",
        ),
        (lambda r: r.update(layers=[{"kind": "conv"}]), r"layers\[0\]\.path: is missing"),
        (lambda r: r.update(speed=[1]), "speed: must be an object"),
        (lambda r: r.update(integer={"step": 1}), r"integer\.test: is missing"),
        (lambda r: r.update(conversion_error=1), "conversion_error: must be a string"),
        (lambda r: r.update(verify=[]), "verify: must be an object"),
        (lambda r: r["verify"].pop("differing"), r"verify\.differing: is missing"),
        (lambda r: r["verify"].update(failures=[1]), r"verify\.failures\[0\]: must be a string"),
        (
            lambda r: r["verify"]["tensors"][0].update(sqnr_db="40"),
            r"verify\.tensors\[0\]\.sqnr_db: must be a number",
        ),
    ],
)
def test_problem_in_results_is_named_by_its_key(write_run, change, message):
    workdir = write_run(deployed=True)
    edit_results(workdir, change)

    with pytest.raises(ReportError, match=rf"results\.json is broken: .*{message}"):
        read_run(workdir)


def test_last_line_of_a_repeated_epoch_counts(write_run):
    workdir = write_run(fp32_epochs=3, qat_epochs=0)
    again = {"stage": "fp32", "epoch": 2, "loss": 0.125, "accuracy": 0.75}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    epochs = read_run(workdir).epochs["fp32"]

    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert epochs[1] == again
