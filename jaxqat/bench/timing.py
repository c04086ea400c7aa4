"""Timing in alternation: engines take turns, and what is compared are medians over turns.

A machine's clock, caches and other users change within seconds. Of two engines that are timed one
after the other, each may meet another machine; in turns, both meet the same one.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Call = Callable[[], Any]
"""Does the timed work once, and returns when it is done."""

# A turn of a small batch is several calls: one of a millisecond would time the waking of threads.
TURN_SECONDS = 0.1
# Threads of ONNX Runtime and OpenMP spin for some ten milliseconds before they sleep; the next
# engine would share the cores with them.
REST_SECONDS = 0.05


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """The order of each round: all names, forth and back, and then beginning one further.

    Otherwise each would run behind the same neighbour, and with what that leaves in the caches.
    """
    for i in range(rounds):
        first = i // 2 % max(len(names), 1)
        order = (*names[first:], *names[:first])
        yield order[::-1] if i % 2 else order


def alternate(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    turn_seconds: float = TURN_SECONDS,
    rest_seconds: float = REST_SECONDS,
) -> dict[str, list[float]]:
    """Seconds of one call, by round, of calls that take turns.

    Args:
        calls: By name; compiled and warm.
        rounds: How often each has its turn.
        turn_seconds: How long a turn lasts at least; it is one call or more.
        rest_seconds: Idle time before each turn.

    Returns:
        By name, for each round the mean over the calls of its turn.
    """
    repeats = {
        name: max(1, math.ceil(turn_seconds / max(seconds_of(call), 1e-9)))
        for name, call in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for order in turns(list(calls), rounds):
        for name in order:
            time.sleep(rest_seconds)
            seconds[name].append(seconds_of(calls[name], repeats[name]))
    return seconds


def seconds_of(call: Call, repeats: int = 1) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def summarize(seconds: Sequence[float], items: int) -> dict[str, Any]:
    """Median, quartiles and rate.

    Args:
        seconds: Of each round.
        items: Images that a call works on.
    """
    first, median, third = np.percentile(seconds, (25, 50, 75)).tolist()
    return {
        "seconds": list(seconds),
        "median_s": median,
        "quartiles_s": [first, third],
        "images_per_s": items / median,
    }


def add_ratios(rows: Sequence[dict[str, Any]], baselines: Mapping[str, str]) -> None:
    """How many times as fast as a baseline each measured row is, by medians.

    Args:
        rows: With a 'key', and 'median_s' where they were measured; changed in place.
        baselines: Name of the ratio -> key of the row that it is of.
    """
    medians = {row["key"]: row["median_s"] for row in rows if "median_s" in row}
    for row in rows:
        for name, key in baselines.items():
            known = key in medians and "median_s" in row
            row[name] = medians[key] / row["median_s"] if known else None
