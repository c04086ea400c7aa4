"""Timing in alternation, on a clock that only the calls move."""

import math

import numpy as np
import pytest

from jaxqat.bench import timing


class Clock:
    """A clock that only calls advance; logs the names of calls and the idle times.

    Times are multiples of a power of two: their sums are exact.
    """

    def __init__(self, monkeypatch):
        self.now, self.log, self.slowness = 0.0, [], 1.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "sleep", lambda seconds: self.log.append(seconds))

    def call(self, name, seconds):
        def call():
            self.now += seconds * self.slowness
            self.log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_order_reverses_in_every_second_round_and_then_starts_with_the_next_engine(clock):
    calls = {name: clock.call(name, 1.0) for name in "abc"}
    seconds = timing.alternate(calls, rounds=4, measurement_seconds=0.5, rest_seconds=0.25)
    names = [entry for entry in clock.log if isinstance(entry, str)]
    # The first call of each determines the number of repetitions.
    assert "".join(names) == "abc" + "abc" + "cba" + "bca" + "acb"
    assert seconds == {name: [1.0] * 4 for name in "abc"}


def test_the_machine_rests_before_every_measurement(clock):
    calls = {name: clock.call(name, 1.0) for name in "ab"}
    timing.alternate(calls, rounds=2, measurement_seconds=0.5, rest_seconds=0.25)
    assert clock.log[2:] == [0.25, "a", 0.25, "b", 0.25, "b", 0.25, "a"]


def test_a_measurement_of_a_fast_engine_is_the_mean_of_many_calls(clock):
    calls = {"fast": clock.call("fast", 2.0**-7), "slow": clock.call("slow", 1.0)}
    seconds = timing.alternate(calls, rounds=3, measurement_seconds=0.1, rest_seconds=0)
    assert seconds == {"fast": [2.0**-7] * 3, "slow": [1.0] * 3}
    assert clock.log.count("fast") == 1 + 3 * math.ceil(0.1 * 2**7)
    assert clock.log.count("slow") == 1 + 3


def test_a_machine_that_slows_down_does_not_change_the_ratio_of_engines(clock, monkeypatch):
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 2.0)}

    def sleep(seconds):
        clock.log.append(seconds)
        clock.slowness = 4.0 if clock.log.count(seconds) > 8 else 1.0

    monkeypatch.setattr(timing.time, "sleep", sleep)
    seconds = timing.alternate(calls, rounds=8, measurement_seconds=0.5)
    assert sorted(seconds["a"]) == [1.0] * 4 + [4.0] * 4
    rows = [{"key": key, **timing.summarize(values, 1)} for key, values in seconds.items()]
    timing.add_ratios(rows, {"ratio": "b"})
    assert [row["ratio"] for row in rows] == [2.0, 1.0]  # 8, if b ran after all rounds of a.


def test_median_quartiles_and_rate_are_numpy_s():
    seconds = np.random.default_rng(0).gamma(3.0, 0.1, 11).tolist()
    found = timing.summarize(seconds, 32)
    ordered = np.sort(seconds)
    # Of eleven values: the sixth, and the means of third and fourth and of eighth and ninth.
    assert found["median_s"] == ordered[5] == np.median(seconds)
    np.testing.assert_allclose(
        found["quartiles_s"], [(ordered[2] + ordered[3]) / 2, (ordered[7] + ordered[8]) / 2]
    )
    assert found["images_per_s"] == 32 / np.median(seconds)
    assert found["seconds"] == seconds


def test_a_ratio_above_one_is_faster_and_none_if_either_was_not_measured():
    rows = [
        {"key": "base", "median_s": 2.0},
        {"key": "fast", "median_s": 0.5},
        {"key": "slow", "median_s": 8.0},
        {"key": "absent", "not_measured": "is not installed"},
    ]
    timing.add_ratios(rows, {"to_base": "base", "to_absent": "absent"})
    assert [row["to_base"] for row in rows] == [1.0, 4.0, 0.25, None]
    assert [row["to_absent"] for row in rows] == [None] * 4
