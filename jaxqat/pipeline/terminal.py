"""Tables and lines in the terminal, all of one form.

Text is printed as it is: a name may hold brackets, which `rich` would read as markup. Control
characters, which would steer the terminal, and bytes that are no text are printed as escapes.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import repeat

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


class QuietConsole(Console):
    """A console for results, warnings and errors only: `tell` prints nothing on it."""


def print_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    console: Console,
    *,
    texts: int = 1,
    red: Iterable[bool] = repeat(False),
    caption: str = "",
    dense: bool = False,
) -> None:
    """Print a table that fits the terminal: text is folded, numbers stay whole.

    Args:
        title: Line above the table.
        header: Name of each column.
        rows: The cells of each row.
        console: Where the table is printed.
        texts: Number of columns of text, which come first; the columns after them hold numbers
            and are aligned right.
        red: For each row, whether it is printed in red.
        caption: Line below the table.
        dense: Whether to leave out the frame, for tables of many columns.
    """
    table = Table(
        title=_as_it_is(title, "table.title"),
        caption=_as_it_is(caption, "table.caption") if caption else None,
        box=SIMPLE_HEAD if dense else HEAVY_HEAD,
        padding=0 if dense else (0, 1),
    )
    for name in header[:texts]:
        table.add_column(_as_it_is(name), overflow="fold")
    for name in header[texts:]:
        table.add_column(_as_it_is(name), justify="right", no_wrap=True)
    for cells, is_red in zip(rows, red, strict=False):
        table.add_row(*map(_as_it_is, cells), style="bold red" if is_red else None)
    console.print(table)


def say(text: str, console: Console, *, style: str = "") -> None:
    """Print a line; the terminal, and not a line break, folds it."""
    console.print(_as_it_is(text, style), soft_wrap=True)


def tell(text: str, console: Console | None, *, style: str = "") -> None:
    """Print a line of progress; nothing on a quiet console, or without one."""
    if console is not None and not isinstance(console, QuietConsole):
        say(text, console, style=style)


def _as_it_is(text: str, style: str = "") -> Text:
    """Return text without markup, its control characters and lone surrogates escaped."""
    odd = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cs")}
    return Text(text.translate({ord(c): ascii(c)[1:-1] for c in odd}), style)
