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
        ("results.json", b"[]", r"results\.json is broken: must hold an object"),
        ("results.json", b'{"name": "x"}', "none of the stages fp32, ptq, qat, integer"),
        ("results.json", b"\xff\xfe", r"results\.json cannot be read"),
        ("metrics.jsonl", b'{"stage": "fp32", "ep', r"metrics\.jsonl, line 1 is not JSON"),
        ("metrics.jsonl", b'\n{"stage": "fp32"}\n', "line 2 must hold stage, epoch"),
        ("metrics.jsonl", b"", r"metrics\.jsonl is broken: holds no epoch"),
        ("config.yaml", b"a: [", r"config\.yaml is not YAML"),
        ("config.yaml", b"- a", r"config\.yaml is broken: must hold a mapping"),
        ("report_data.npz", b"PK\x03\x04", r"report_data\.npz is broken"),
        ("report_data.npz", b"", r"report_data\.npz is broken"),
    ],
)
def test_broken_file_is_named_with_what_is_wrong(write_run, name, content, message):
    workdir = write_run()
    (workdir / name).write_bytes(content)

    with pytest.raises(ReportError, match=message):
        read_run(workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("name"), "lacks the text 'name'"),
        (lambda r: r["fp32"].pop("test"), "lacks the object 'fp32.test'"),
        (lambda r: r["qat"]["test"].pop("f1"), "lacks the number 'qat.test.f1'"),
        (lambda r: r["qat"].update(calibrated={}), "lacks the object 'qat.calibrated.test'"),
        (lambda r: r["fp32"]["test"].pop("per_class"), "lacks the list 'fp32.test.per_class'"),
        (
            lambda r: r["fp32"]["test"]["per_class"][0].pop("support"),
            "'fp32.test.per_class' must hold name",
        ),
        (
            lambda r: r["fp32"]["test"]["confusion_matrix"].pop(),
            "'fp32.test.confusion_matrix' must be 10 lists of 10 counts",
        ),
        (
            lambda r: r["qat"].update(
                test=r["qat"]["test"] | {"per_class": [], "confusion_matrix": []}
            ),
            "different numbers of classes",
        ),
        (lambda r: r.update(layers=[{"kind": "conv"}]), "'layers' must be a list"),
        (lambda r: r.update(speed=[1]), "'speed' must be an object"),
        (lambda r: r.update(integer=[1]), "'integer' must be an object"),
        (lambda r: r.update(integer={"step": 1}), "lacks the object 'integer.test'"),
        (lambda r: r.update(integer={"error": 1}), "'integer.error' must be a text"),
    ],
)
def test_what_results_lack_is_named_by_its_key(write_run, change, message):
    workdir = write_run()
    edit_results(workdir, change)

    with pytest.raises(ReportError, match=rf"results\.json is broken: .*{message}"):
        read_run(workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(verify=[]), "'verify' must be an object"),
        (lambda r: r["verify"].pop("differing"), "lacks the number 'verify.differing'"),
        (lambda r: r["verify"].update(failures=[1]), "'verify.failures' must be a list of texts"),
        (lambda r: r["verify"].pop("tensors"), "lacks the list 'verify.tensors'"),
        (
            lambda r: r["verify"]["tensors"][0].pop("codes"),
            "'verify.tensors' must hold name, codes",
        ),
        (lambda r: r["verify"]["tensors"][0].update(sqnr_db="40"), "'verify.tensors' must hold"),
    ],
)
def test_what_a_verification_lacks_is_named_by_its_key(write_run, change, message):
    workdir = write_run(deployed=True)
    edit_results(workdir, change)

    with pytest.raises(ReportError, match=rf"results\.json is broken: .*{message}"):
        read_run(workdir)


def test_epoch_that_was_done_again_after_a_resume_counts_by_its_last_line(write_run):
    workdir = write_run(fp32_epochs=3, qat_epochs=0)
    again = {"stage": "fp32", "epoch": 2, "loss": 0.125, "accuracy": 0.75}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    epochs = read_run(workdir).epochs["fp32"]

    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert epochs[1] == again


def test_stages_come_in_the_order_they_are_made(write_run):
    workdir = write_run()
    edit_results(workdir, lambda r: r.update(integer=r.pop("fp32"), fp32=r.pop("qat")))

    assert read_run(workdir).stages == ("fp32", "integer")
