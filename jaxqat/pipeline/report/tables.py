"""The tables of a report, as text."""

from typing import Any

from jaxqat.analysis._text import decibels, duration, percent
from jaxqat.pipeline.report import paper
from jaxqat.pipeline.report.figures import MAX_NAMED_CLASSES
from jaxqat.pipeline.report.read import Run
from jaxqat.pipeline.results import (
    LayerResult,
    Results,
    Scores,
    StageResult,
    TensorDifferences,
    Tested,
    VerificationResult,
)

DASH = "–"
MAX_CONFUSIONS = 8


def title(results: Results) -> str:
    """Return the bits before and after quantization, such as 'FP32 to W4A4'."""
    last = results.qat or next(iter(results.ptq.values()), None)
    return "FP32" if last is None else f"FP32 to {last.bits}"


def minus(text: str) -> str:
    """Return a number with a minus sign, as wide as a plus sign, instead of a hyphen."""
    return text.replace("-", "−")


def count(value: Any) -> str:
    """Return a whole number with thousands separators, or a dash for None."""
    return DASH if value is None else f"{round(value):,}"


def rate(value: float | None) -> str:
    """Return images per second as text, with at most three digits below 100."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def scores(run: Run) -> list[dict[str, Any]]:
    """Return the scores of every network, each followed by the paper's if the data is the same."""
    rows = []
    for network in run.results.tested():
        rows.append({"name": network.name, "source": "this run", "cells": _scores(network.test)})
        if network.key in paper.SCORES and paper.is_on_paper_data(run):
            cells = [*map(percent, paper.SCORES[network.key]), DASH]  # It gives no loss.
            rows.append({"name": paper.NAMES[network.key], "source": "paper", "cells": cells})
    return rows


def _scores(test: Scores) -> list[str]:
    shares = (test.accuracy, test.precision, test.recall, test.f1)
    return [*map(percent, shares), f"{test.loss:.4f}"]


def compared(results: Results) -> list[Tested]:
    """Return the networks that are compared class by class: the float network and the last one."""
    first, *rest = results.tested()
    return [first, *rest[-1:]]


def per_class(results: Results) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of every class by the compared networks, in percent.

    Names begin with the index of the class if the confusion matrix shows only indices.
    """
    tests = [network.test.per_class for network in compared(results)]
    indexed = len(tests[0]) > MAX_NAMED_CLASSES
    return [
        {
            "name": f"{i} {each[0].name}" if indexed else each[0].name,
            "support": count(each[0].support),
            "cells": [percent(s) for c in each for s in (c.precision, c.recall, c.f1)],
        }
        for i, each in enumerate(zip(*tests, strict=True))
    ]


def confusions(test: Scores) -> list[str]:
    """Return the most frequent errors, such as 'cat taken for dog: 61'; ties in class order."""
    names = [each.name for each in test.per_class]
    errors = [
        (number, i, j)
        for i, row in enumerate(test.confusion_matrix)
        for j, number in enumerate(row)
        if i != j and number > 0
    ]
    errors.sort(key=lambda error: (-error[0], error[1:]))
    return [f"{names[i]} taken for {names[j]}: {count(n)}" for n, i, j in errors[:MAX_CONFUSIONS]]


def layers(results: Results) -> list[dict[str, Any]]:
    """Return every layer with its bits and ranges and, if it stays in float, the reason."""
    return [
        {
            "path": layer.path,
            "kind": layer.kind,
            "shape": "×".join(map(str, layer.weight_shape)) or DASH,
            "bits": f"{_bits(layer.weight_bits)} / {_bits(layer.act_bits)}",
            "macs": count(layer.macs),
            "weights": _ends(layer.weight_min, layer.weight_max),
            "acts": _ends(layer.act_min, layer.act_max),
            "is_float": is_float(layer),
            "reason": layer.float_reason or ("not recorded" if is_float(layer) else ""),
        }
        for layer in results.layers
    ]


def is_float(layer: LayerResult) -> bool:
    """Return whether a layer computes in float: integer products need codes of both operands."""
    return bool(layer.float_reason) or None in (layer.weight_bits, layer.act_bits)


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _ends(low: float | None, high: float | None) -> str:
    return DASH if low is None or high is None else minus(f"{low:.3g} … {high:.3g}")


def verification(results: Results) -> dict[str, Any] | None:
    """Return where the integer network differs from the quantized one, by tensor and in total."""
    check = results.verify
    if check is None:
        return None
    flips = check.top1_flips_fp32
    return {
        "tensors": [
            {"name": t.name, "cells": [*_differences(t), decibels(t.sqnr_db)]}
            for t in check.tensors
        ],
        "total": [*_differences(check), DASH],
        "images": count(check.images),
        "flips": count(check.top1_flips),
        "flips_fp32": None if flips is None else count(flips),
        "failures": check.failures,
    }


def _differences(counted: TensorDifferences | VerificationResult) -> list[str]:
    return [count(n) for n in (counted.codes, counted.differing, counted.largest)]


def post_training(results: Results) -> list[dict[str, Any]]:
    """Return the calibration and the failures of post-training quantization, by each recipe."""
    return [
        {
            "name": name,
            "batches": count(ptq.calibration_batches),
            "images": count(ptq.calibration_images),
            "failures": () if ptq.verify is None else ptq.verify.failures,
        }
        for name, ptq in results.ptq.items()
    ]


def size(results: Results) -> dict[str, str]:
    """Return the bytes of the FP32 network and of the integer network, and their ratio."""
    fp32, integer = results.size_bytes.fp32, results.size_bytes.integer
    if integer is None and results.ptq:
        integer = next(iter(results.ptq.values())).size_bytes
    return {
        "fp32": count(fp32),
        "integer": count(integer),
        "ratio": f"{fp32 / integer:.2f}" if integer else DASH,
        "parameters": count(results.parameters),
        "macs": count(results.macs),
    }


def sizes(results: Results) -> list[tuple[str, int, float]]:
    """Return name, bytes and accuracy of every network that has a size of its own."""
    bytes_of = sizes_by_key(results)
    return [
        (network.name, bytes_of[network.key], network.test.accuracy)
        for network in results.tested()
        if network.key in bytes_of
    ]


def sizes_by_key(results: Results) -> dict[str, int]:
    """Return the bytes of every network that has a size of its own, by its key."""
    size = {"fp32": results.size_bytes.fp32, "integer": results.size_bytes.integer}
    size |= {f"ptq_{name}": ptq.size_bytes for name, ptq in results.ptq.items()}
    return {key: found for key, found in size.items() if found is not None}


def speed(results: Results) -> list[dict[str, Any]]:
    """Return training speed, evaluation speed and training time of each network."""
    rows = []
    for network in results.tested():
        measured, stage = results.speed.get(network.key), getattr(results, network.key, None)
        cells = [
            rate(measured and measured.train_images_per_s),
            rate(measured and measured.evaluate_images_per_s),
            duration(stage.train_seconds) if isinstance(stage, StageResult) else DASH,
            count(stage.epochs) if isinstance(stage, StageResult) else DASH,
        ]
        if measured is not None:
            rows.append({"name": network.name, "cells": cells})
    return rows
