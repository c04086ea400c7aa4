"""What a stage prints while it trains."""

import io
import time

import pytest
from rich.console import Console

from jaxqat.pipeline.training.progress import StageProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock of whole seconds, which the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def trained(clock, seconds, *, epochs, done=0):
    """Return what is printed over an epoch whose reports, of two steps, come at these times."""
    file = io.StringIO()
    console = Console(file=file, width=200)
    shown = StageProgress(
        console, stage="fp32", epochs=epochs, steps_per_epoch=10, batch_size=4, done=done
    )
    for after in seconds:
        clock[0] = 100.0 + after
        shown.advance(2)
    return file.getvalue()


def test_the_time_of_the_rest_is_estimated_from_the_steps_after_the_first_report(clock):
    # The first report waits for a compilation; then two steps take two seconds.
    shown = trained(clock, (50, 52, 54, 56), epochs=20)
    # At 54 s, six of 200 steps are done, at one step a second.
    assert shown == "fp32: about 3 min 14 s for the remaining 194 steps\n"


def test_a_resumed_stage_counts_what_is_left(clock):
    assert "for the remaining 34 steps" in trained(clock, (50, 52, 54, 56), epochs=20, done=160)


def test_without_a_terminal_a_long_epoch_has_a_line_every_fifteen_seconds(clock):
    shown = trained(clock, (50, 52, 64, 66, 70), epochs=1, done=0).splitlines()
    # At 66 s, the three reports in the 16 s after the first one were of six steps of four images.
    assert shown[1:] == ["fp32: 8 of 10 steps, 2 images/s, 5.3 s left"]


@pytest.mark.parametrize(
    "seconds", [(0, 1, 2), (50, 50.5, 51, 53.5, 54)], ids=["too early", "soon done"]
)
def test_no_time_is_given_before_it_is_known_or_if_it_is_short(clock, seconds):
    assert trained(clock, seconds, epochs=1) == ""
