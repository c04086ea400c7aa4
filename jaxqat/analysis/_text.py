# pyright: strict
"""Tables and measured values as plain text."""

from collections.abc import Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], *, texts: int = 1) -> Iterator[str]:
    """Return the lines of a table.

    Args:
        rows: The cells of each row, the header first; all rows have the same number of cells.
        texts: Number of columns of text, which come first and are aligned left; the columns after
            them hold numbers and are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        pairs = list(zip(row, widths, strict=True))
        left = [cell.ljust(width) for cell, width in pairs[:texts]]
        right = [cell.rjust(width) for cell, width in pairs[texts:]]
        yield "  ".join([*left, *right]).rstrip()


def decibels(ratio: float | None) -> str:
    """Return a ratio in dB as text, with a true minus sign; a dash for None."""
    return "–" if ratio is None else f"{ratio:.1f}".replace("-", "−")


def percent(share: float | None) -> str:
    """Return a share (0 to 1) in percent, as text; a dash for None.

    Two digits: with 10,000 test images, one image is 0.01 %.
    """
    return "–" if share is None else f"{100 * share:.2f}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 epoch" or "1,170 steps"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Return a time as text, such as '1 h 05 min', '2 min 40 s' or '8.3 s'."""
    if seconds < 59.95:  # A longer time would be rounded to 60.0 s.
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
