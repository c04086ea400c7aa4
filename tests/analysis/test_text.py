"""Tables and measured values as plain text."""

import pytest

from jaxqat.analysis._text import aligned, decibels, duration, percent


def test_text_is_aligned_left_and_numbers_right():
    rows = [("path", "kind", "MACs"), ("head", "dense", "12,345"), ("total", "", "7")]
    assert list(aligned(rows, texts=2)) == [
        "path   kind     MACs",
        "head   dense  12,345",
        "total              7",
    ]


def test_lines_have_no_spaces_at_their_end():
    assert list(aligned([("path", "note"), ("head", "")], texts=2)) == ["path  note", "head"]


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (decibels, 40.04, "40.0"),
        (decibels, -3.25, "−3.2"),
        (decibels, None, "–"),
        (percent, 0.98765, "98.77"),
        (percent, 0.0, "0.00"),
        (percent, None, "–"),
    ],
)
def test_measured_values_have_as_many_digits_as_count(show, value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.34, "8.3 s"),
        (59.96, "1 min 00 s"),
        (160.2, "2 min 40 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations_have_one_or_two_units(seconds, text):
    assert duration(seconds) == text
