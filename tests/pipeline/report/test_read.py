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
        (
            "metrics.jsonl",
            b'{"stage": "[/x]", "epoch": 1, "loss": 1, "accuracy": 1}',
            "line 1 must",
        ),
        (
            "metrics.jsonl",
            b'{"stage": "qat", "epoch": 1, "loss": NaN, "accuracy": 1}',
            "line 1 is broken: loss: must be a finite number",
        ),
        (
            "metrics.jsonl",
            b'{"stage": "qat", "epoch": -1, "loss": 1, "accuracy": 1}',
            "line 1 is broken: epoch: must be a whole number in 0",
        ),
        ("metrics.jsonl", b"[" * 100_000, r"metrics\.jsonl, line 1 is not JSON"),
        ("results.json", b"[" * 100_000, r"results\.json is not JSON"),
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
                test=r["qat"]["test"] | {"per_class": [], "confusion_matrix": [], "n": 0}
            ),
            "different numbers of classes",
        ),
        (
            lambda r: r["fp32"]["test"].update(accuracy=7.0),
            r"fp32\.test\.accuracy: must be a number in 0..1, got 7.0",
        ),
        (
            lambda r: r["qat"]["test"].update(loss=float("nan")),
            r"qat\.test\.loss: must be a finite number, got nan",
        ),
        (
            lambda r: r["fp32"]["test"]["confusion_matrix"][0].__setitem__(0, -5),
            r"confusion_matrix\[0\]\[0\]: must be a whole number in 0\.\..*, got -5",
        ),
        (
            lambda r: r["fp32"]["test"]["per_class"][2].update(support=10**30),
            r"fp32\.test\.per_class\[2\]\.support: must be a whole number in 0",
        ),
        (
            lambda r: r["fp32"]["test"].update(n=5),
            "confusion_matrix counts 1000 images, and n is 5",
        ),
        (lambda r: r.update(macs=-1), "macs: must be a whole number in 0"),
        (
            lambda r: r["speed"]["qat"].update(evaluate_images_per_s=-1),
            "evaluate_images_per_s: must",
        ),
        (lambda r: r["layers"][0].update(weight_min=1e300), r"layers\[0\]\.weight_min: must be a"),
        (lambda r: r.update(data={}), "data.name must be the name of the data set, got None"),
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
