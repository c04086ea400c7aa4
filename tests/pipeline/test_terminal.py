"""Tables in the terminal."""

import io

import tiny_run
from rich.console import Console

from jaxqat.pipeline.terminal import print_table, say

console = tiny_run.console

HEADER = ("layer", "codes")


def test_text_is_printed_as_it_is(console):
    odd = [f"{place} [bold] [/] :x:" for place in ("title", "text", "number", "cell", "caption")]
    title, text, number, cell, caption = odd
    print_table(title, (text, number), [(cell, cell)], console, caption=caption)
    say("a line [bold] [/] :x:", console)
    shown = console.file.getvalue()
    assert [shown.count(name) for name in odd] == [1, 1, 1, 2, 1]
    assert shown.endswith("\na line [bold] [/] :x:\n")


def test_a_narrow_terminal_folds_text_and_keeps_numbers_whole():
    file = io.StringIO()
    rows = [("stage1/block0/conv1/input", "123,456,789")]
    print_table("tensors", HEADER, rows, Console(file=file, width=24))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 24
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert "".join(text for text, _ in cells) == rows[0][0]
    assert [number for _, number in cells if number] == [rows[0][1]]


def test_rows_are_red_where_the_caller_says_so():
    file = io.StringIO()
    colored = Console(file=file, width=80, force_terminal=True, color_system="standard")
    print_table("layers", HEADER, [("first", "1"), ("second", "2")], colored, red=[False, True])
    lines = file.getvalue().splitlines()
    for name, is_red in (("first", False), ("second", True)):
        (line,) = [line for line in lines if name in line]
        assert ("\x1b[1;31m" in line) is is_red


def test_a_dense_table_has_no_lines_between_columns(console):
    print_table("layers", HEADER, [("first", "12,345")], console, dense=True)
    assert "\n first 12,345 \n" in console.file.getvalue()
