"""Progress of long work: bars in a terminal, lines elsewhere, nothing where it is quiet."""

import io
import time

import numpy as np
import pytest
from rich.console import Console

from jaxqat.pipeline.data import Split
from jaxqat.pipeline.display import warn
from jaxqat.pipeline.evaluation import Predictor, measure
from jaxqat.pipeline.progress import Work
from jaxqat.pipeline.terminal import QuietConsole, say, tell


@pytest.fixture
def clock(monkeypatch):
    """A clock of whole seconds, which the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_work_has_a_line_every_fifteen_seconds(clock):
    file = io.StringIO()
    with Work(Console(file=file, width=200), "verifying", 1000) as work:
        for batch in work.track([np.zeros(100)] * 10):
            clock[0] += len(batch) / 10  # Ten images a second, after a first batch of 10 s.
    assert file.getvalue().splitlines() == [
        "verifying",
        "verifying: 300 of 1,000 images, 10 images/s, 1 min 10 s left",
        "verifying: 500 of 1,000 images, 10 images/s, 50.0 s left",
        "verifying: 700 of 1,000 images, 10 images/s, 30.0 s left",
        "verifying: 900 of 1,000 images, 10 images/s, 10.0 s left",
    ]


def test_in_a_terminal_work_has_a_bar_with_rate_and_rest(clock):
    file = io.StringIO()
    terminal = Console(file=file, width=100, force_terminal=True, color_system=None)
    with Work(terminal, "verifying", 40) as work:
        for _ in range(3):
            clock[0] += 2
            work.advance(10)
        work._bar.refresh()
    shown = file.getvalue()
    assert "30/40 5 images/s, ETA" in shown and "━" in shown
    assert "of 40 images" not in shown  # No lines beside the bar.


@pytest.mark.parametrize("make", [QuietConsole, lambda **_: None], ids=["quiet", "none"])
def test_a_quiet_console_and_no_console_show_no_progress(make):
    file = io.StringIO()
    console = make(file=file, width=100, force_terminal=True)
    with Work(console, "verifying", 40) as work:
        work.advance(10)
        tell("a line", console)
    assert file.getvalue() == ""


def test_a_quiet_console_shows_results_and_warnings():
    console = QuietConsole(file=io.StringIO(), width=100)
    say("accuracy", console)
    warn("too few", console)
    assert console.file.getvalue().splitlines() == ["accuracy", "warning: too few"]  # pyright: ignore


def test_every_image_is_counted_once_in_an_evaluation(monkeypatch):
    counts = []
    monkeypatch.setattr(Work, "advance", lambda self, count: counts.append(count))
    split = Split(np.zeros((25, 1, 1, 1), np.uint8), np.zeros(25, np.int32))
    predictor = Predictor(lambda images: np.zeros((len(images), 2), np.float32), 10)
    console = Console(file=io.StringIO(), width=100)
    found = measure(predictor, split, ("a", "b"), what="fp32", console=console)
    assert counts == [10, 10, 5] and found.scores.n == 25
