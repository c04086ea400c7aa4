"""Time several calls in alternation and compare their medians.

A machine's clock, caches and load change within seconds. Alternation exposes all engines to the
same changes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Call = Callable[[], Any]
"""Does the timed work once and returns when it is done."""

# Short calls are repeated: a single one of a millisecond would time the waking of threads.
MEASUREMENT_SECONDS = 0.1
# Threads of ONNX Runtime and OpenMP spin for some ten milliseconds before they sleep, and would
# take cores from the next engine.
REST_SECONDS = 0.05


def round_orders(names: Sequence[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """Yield the order of names in each round; every second round reverses the one before.

    Every two rounds the order begins with the next name. So the predecessor of an engine varies,
    and with it the content of the caches.
    """
    for i in range(rounds):
        first = i // 2 % max(len(names), 1)
        order = (*names[first:], *names[:first])
        yield order[::-1] if i % 2 else order


def alternate(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    measurement_seconds: float = MEASUREMENT_SECONDS,
    rest_seconds: float = REST_SECONDS,
) -> dict[str, list[float]]:
    """Measure the time of calls, all of them in every round.

    Args:
        calls: Calls by name, compiled and warm.
        rounds: Number of measurements of each call.
        measurement_seconds: Least duration of a measurement, by repeating the call.
        rest_seconds: Idle time before each measurement.

    Returns:
        Mean seconds of one call in each round, by name.
    """
    repeats = {
        name: max(1, math.ceil(measurement_seconds / max(seconds_of(call), 1e-9)))
        for name, call in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for order in round_orders(list(calls), rounds):
        for name in order:
            time.sleep(rest_seconds)
            seconds[name].append(seconds_of(calls[name], repeats[name]))
    return seconds


def seconds_of(call: Call, repeats: int = 1) -> float:
    """Return the mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def summarize(seconds: Sequence[float], items: int) -> dict[str, Any]:
    """Return all times, their median and quartiles, and images per second.

    Args:
        seconds: Time of a call in each round.
        items: Images per call.
    """
    first, median, third = np.percentile(seconds, (25, 50, 75)).tolist()
    return {
        "seconds": list(seconds),
        "median_s": median,
        "quartiles_s": [first, third],
        "images_per_s": items / median,
    }


def add_ratios(rows: Sequence[dict[str, Any]], baselines: Mapping[str, str]) -> None:
    """Add to each row its speed relative to the baselines, by medians; None if not measured.

    Args:
        rows: Table rows with 'key' and, if measured, 'median_s'; changed in place.
        baselines: Key of the baseline's row, by the name of the ratio.
    """
    medians = {row["key"]: row["median_s"] for row in rows if "median_s" in row}
    for row in rows:
        for name, key in baselines.items():
            known = key in medians and "median_s" in row
            row[name] = medians[key] / row["median_s"] if known else None
