import dataclasses

import pytest
from pipeline.report.made_up import layer, scores

from jaxqat.pipeline.report import paper, tables
from jaxqat.pipeline.report.read import read_run


def by_source(run):
    return [(row["name"], row["source"], row["cells"][0]) for row in tables.scores(run)]


def test_the_papers_scores_follow_those_of_a_run_of_its_recipe(write_run):
    run = read_run(write_run())
    own = {network.key: tables.percent(network.test.accuracy) for network in run.results.tested()}

    assert by_source(run) == [
        ("FP32", "this run", own["fp32"]),
        ("FP32", "paper", "94.79"),
        ("QAT W8A8, quantized", "this run", own["qat"]),
        ("QAT W8A8", "paper", "94.60"),
    ]
    # Its Table 1: accuracy, precision, recall (in the table behind F1) and F1; it gives no loss.
    assert [row["cells"] for row in tables.scores(run) if row["source"] == "paper"] == [
        ["94.79", "94.79", "94.78", "94.79", "–"],
        ["94.60", "94.59", "94.59", "94.60", "–"],
    ]
    assert paper.departures(run) == []


def test_the_paper_is_not_listed_for_another_data_set(write_run):
    run = read_run(write_run(data="digits"))

    assert {source for _, source, _ in by_source(run)} == {"this run"}
    assert paper.departures(run) == ["the data set is digits, the paper's is CIFAR-10"]


def test_every_departure_from_the_papers_recipe_is_listed(write_run):
    workdir = write_run(data="cifar10:3.0.2", width=16, fp32_epochs=3, qat_epochs=1)
    config = workdir / "config.yaml"
    config.write_text(config.read_text().replace("validation_size: 0", "validation_size: 5000"))
    run = read_run(workdir)

    assert ("FP32", "paper", "94.79") in by_source(run)
    assert paper.departures(run) == [
        "width is 16, the paper's is 64",
        "FP32 ran 3 epochs, the paper's 100",
        "QAT ran 1 epochs, the paper's 30",
        "5000 training images were held out for validation",
    ]


def test_bits_other_than_the_papers_are_a_departure(write_run):
    workdir = write_run()
    path = workdir / "results.json"
    path.write_text(path.read_text().replace("W8A8", "W4A4"))
    run = read_run(workdir)

    assert paper.departures(run) == ["QAT is W4A4, the paper's is W8A8"]
    assert tables.title(run.results) == "FP32 to W4A4"


def test_errors_are_listed_most_frequent_first_and_in_class_order():
    test = scores("abc", 0.9, seed=0)
    matrix = ((9, 2, 0), (2, 9, 5), (0, 1000, 9))

    test = dataclasses.replace(test, confusion_matrix=matrix, n=1036)
    assert tables.confusions(test) == [
        "c taken for b: 1,000",
        "b taken for c: 5",
        "a taken for b: 2",
        "b taken for a: 2",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"weight_bits": 4}, False),
        ({"act_bits": None}, True),
        ({"weight_bits": None}, True),
        ({"float_reason": "complex numbers"}, True),
    ],
)
def test_layer_is_integer_only_with_codes_for_both_operands(changes, expected):
    assert tables.is_float(layer(**changes)) is expected


def test_float_layer_without_a_recorded_reason_says_so(write_run):
    results = read_run(write_run()).results
    in_float = layer(weight_bits=None, act_min=None, act_max=None)
    row = tables.layers(dataclasses.replace(results, layers=(in_float,)))[0]

    assert (row["reason"], row["bits"], row["acts"]) == ("not recorded", "float / 8", "–")


def test_size_says_how_many_times_smaller_the_weights_are(write_run):
    results = read_run(write_run(deployed=True)).results

    assert tables.size(results) == {
        "fp32": "44,695,848",
        "integer": "11,248,816",
        "ratio": "3.97",
        "parameters": "11,173,962",
        "macs": "555,422,720",
    }
