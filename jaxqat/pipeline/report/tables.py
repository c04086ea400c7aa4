"""The tables of a report, as plain rows of text for the page to lay out."""

from collections.abc import Mapping
from typing import Any

from jaxqat.pipeline.report import paper
from jaxqat.pipeline.report.figures import MAX_NAMED_CLASSES, layer_range
from jaxqat.pipeline.report.read import Run

STAGE_NAMES = {"fp32": "FP32", "ptq": "PTQ int8", "qat": "QAT", "integer": "QAT int8"}
DASH = "–"
CLASS_SCORES = ("precision", "recall", "f1")
MANY_CONFUSIONS = 8


def stage_name(stage: str) -> str:
    """How the page calls a stage."""
    return STAGE_NAMES.get(stage, stage)


def percent(fraction: float) -> str:
    """A fraction of 1 in percent: 10,000 test images make steps of 0.01 %."""
    return f"{100 * fraction:.2f}"


def minus(text: str) -> str:
    """A number with a minus sign as wide as its plus sign."""
    return text.replace("-", "−")


def count(value: Any) -> str:
    """A whole number with thousands set apart, or a dash for None."""
    return DASH if value is None else f"{round(value):,}"


def rate(value: float | None) -> str:
    """Images per second: whole ones, or three digits where there are few."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def scores(run: Run) -> list[dict[str, Any]]:
    """The paper's Table 1: every stage of this run, each with the paper's figure below it."""
    rows = []
    for stage in run.stages:
        result = run.results[stage]
        # Runs of before 'ptq' tested the calibrated network as QAT computes it.
        if result.get("calibrated") and "ptq" not in run.stages:
            test = result["calibrated"]["test"]
            rows.append(_score_row("Calibrated only, before fine-tuning", "this run", test))
        rows.append(_score_row(stage_name(stage), "this run", result["test"]))
        if stage in paper.ACCURACY and paper.is_on_paper_data(run):
            accuracy = percent(paper.ACCURACY[stage])
            cells = [accuracy, DASH, DASH, DASH, DASH]
            rows.append({"name": stage_name(stage), "source": "paper", "cells": cells})
    return rows


def _score_row(name: str, source: str, test: Mapping[str, Any]) -> dict[str, Any]:
    quality = [percent(test[score]) for score in ("accuracy", "precision", "recall", "f1")]
    return {"name": name, "source": source, "cells": [*quality, f"{test['loss']:.4f}"]}


def per_class(run: Run) -> list[dict[str, Any]]:
    """Precision, recall and F1 of every class and stage, in percent.

    Where the confusion matrix has no room for names, its indices stand here as well.
    """
    tests = [run.results[stage]["test"]["per_class"] for stage in run.stages]
    indexed = len(tests[0]) > MAX_NAMED_CLASSES
    return [
        {
            "name": f"{i} {rows[0]['name']}" if indexed else rows[0]["name"],
            "support": count(rows[0]["support"]),
            "cells": [percent(row[score]) for row in rows for score in CLASS_SCORES],
        }
        for i, rows in enumerate(zip(*tests, strict=True))
    ]


def confusions(test: Mapping[str, Any]) -> list[str]:
    """The most frequent errors, as 'cat taken for dog: 61'; ties in the order of classes."""
    names = [row["name"] for row in test["per_class"]]
    errors = [
        (number, i, j)
        for i, row in enumerate(test["confusion_matrix"])
        for j, number in enumerate(row)
        if i != j and number > 0
    ]
    errors.sort(key=lambda error: (-error[0], error[1:]))
    return [f"{names[i]} taken for {names[j]}: {count(n)}" for n, i, j in errors[:MANY_CONFUSIONS]]


def layers(run: Run) -> list[dict[str, Any]]:
    """Every layer with its bits, its ranges and, where it stays in float, the reason."""
    return [
        {
            "path": layer["path"],
            "kind": layer.get("kind") or DASH,
            "shape": "×".join(map(str, layer.get("weight_shape") or ())) or DASH,
            "bits": f"{_bits(layer, 'weight')} / {_bits(layer, 'act')}",
            "macs": count(layer.get("macs")),
            "weights": _ends(layer_range(layer, "weight")),
            "acts": _ends(layer_range(layer, "act")),
            "is_float": is_float(layer),
            "reason": layer.get("float_reason") or ("not recorded" if is_float(layer) else ""),
        }
        for layer in run.results.get("layers") or []
    ]


def is_float(layer: Mapping[str, Any]) -> bool:
    """Whether a layer computes in float: one side without codes leaves no integer product."""
    return bool(layer.get("float_reason")) or None in (
        layer.get("weight_bits"),
        layer.get("act_bits"),
    )


def _bits(layer: Mapping[str, Any], kind: str) -> str:
    bits = layer.get(f"{kind}_bits")
    return "float" if bits is None else str(bits)


def _ends(ends: tuple[float, float] | None) -> str:
    return DASH if ends is None else minus(f"{ends[0]:.3g} … {ends[1]:.3g}")


def verification(run: Run) -> dict[str, Any] | None:
    """How far the integer network is from the training graph, tensor by tensor and in total."""
    check = run.results.get("verify")
    if check is None:
        return None
    tensors = [{"name": t["name"], "cells": _differences(t)} for t in check["tensors"]]
    flips = check.get("top1_flips_fp32")
    return {
        "tensors": tensors,
        "total": _differences(check),
        "images": count(check["images"]),
        "flips": count(check["top1_flips"]),
        "flips_fp32": None if flips is None else count(flips),
        "failures": check["failures"],
    }


def _differences(counted: Mapping[str, Any]) -> list[str]:
    decibels = counted.get("sqnr_db")
    counts = [count(counted[key]) for key in ("codes", "differing", "largest")]
    return [*counts, DASH if decibels is None else minus(f"{decibels:.1f}")]


def post_training(run: Run) -> dict[str, Any] | None:
    """How the network of post-training quantization was made, where there is one."""
    ptq = run.results.get("ptq")
    if ptq is None:
        return None
    return {
        "batches": count(ptq.get("calibration_batches")),
        "images": count(ptq.get("calibration_images")),
        "preset": ptq.get("preset"),
        "failures": (ptq.get("verify") or {}).get("failures", []),
    }


def size(run: Run) -> dict[str, str] | None:
    """Bytes of the FP32 network and of the integer network, and how many times smaller."""
    sizes = run.results.get("size_bytes") or {}
    fp32, untrained = sizes.get("fp32"), run.results.get("ptq") or {}
    int8 = sizes.get("integer", untrained.get("size_bytes"))
    if fp32 is None:
        return None
    return {
        "fp32": count(fp32),
        "int8": count(int8),
        "ratio": f"{fp32 / int8:.2f}" if int8 else DASH,
        "parameters": count(run.results.get("parameters")),
        "macs": count(run.results.get("macs")),
    }


def speed(run: Run) -> list[dict[str, Any]]:
    """Images per second of each stage, training and evaluating, and its training time."""
    rows = []
    for stage in run.stages:
        measured = (run.results.get("speed") or {}).get(stage) or {}
        seconds = run.results[stage].get("train_seconds")
        cells = [
            rate(measured.get("train_images_per_s")),
            rate(measured.get("evaluate_images_per_s")),
            DASH if seconds is None else duration(seconds),
            count(paper.stage_epochs(run, stage)),
        ]
        if cells[:3] != [DASH] * 3:
            rows.append({"name": stage_name(stage), "cells": cells})
    return rows


def duration(seconds: float) -> str:
    """A time in the largest two units that fit: '1 h 05 min', '2 min 40 s', '8.3 s'."""
    if seconds < 59.95:  # What is less would be written as 60.0 s.
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
