"""The table of kernels: totals and printed text."""

import dataclasses
import io

import jax
import pytest
from lowering.functions import CASES, F32, S32, dot, shape
from lowering.networks import CONVOLUTIONS, network, network_shapes
from lowering.targets import for_targets
from rich.console import Console

from jaxqat.commands.lowering import in_bytes, print_lowering
from jaxqat.lowering import compile_for, lowering_table


def printed(compiled, width=160):
    file = io.StringIO()
    print_lowering(compiled, Console(file=file, width=width))
    return file.getvalue()


def compiled_case(name, target="cpu"):
    return compile_for(target, CASES[name].function, *CASES[name].shapes)


def test_totals_are_sums_over_the_kernels():
    table = lowering_table(compile_for("cpu", network, network_shapes(32), shape(8, 16, 16, 4)))
    assert (table.integer_products, table.float_products) == (CONVOLUTIONS + 1, 0)
    assert table.bytes_moved == sum(row.bytes_read + row.bytes_written for row in table.rows)
    assert table.cycles is None
    products = [row for row in table.rows if row.products]
    assert len(products) == CONVOLUTIONS + 1
    assert {row.products for row in products} == {"s8 x s8 -> s32"}
    # s8 in, s32 out, of a convolution with 3 x 3 x 32 x 32 weights.
    rows = [row for row in products if row.layer == "block0"]
    moved = {(row.bytes_read, row.bytes_written) for row in rows}
    assert moved == {(8 * 16 * 16 * 32 + 9 * 32 * 32, 4 * 8 * 16 * 16 * 32)}


def test_kernels_in_loops_count_once_per_iteration():
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    matrix = shape(64, 64, dtype=F32)
    table = lowering_table(compile_for("cpu", function, matrix, shape(5, 64, 64, dtype=F32)))
    (row,) = (row for row in table.rows if row.products)
    assert row.times == 5
    moved = sum(row.times * (row.bytes_read + row.bytes_written) for row in table.rows)
    assert table.bytes_moved == moved
    assert f"{row.kernel} (5 times)" in printed(
        compile_for("cpu", function, matrix, shape(5, 64, 64, dtype=F32))
    )


def test_a_row_shows_types_results_and_layer():
    def function(x, w):
        with jax.named_scope("net[head]"):  # rich would take it for markup.
            return dot(x, w, S32)

    text = printed(compile_for("cpu", function, shape(32, 64), shape(64, 128)))
    assert "this machine's CPU (cpu), kernels: 1" in text
    (row,) = (line for line in text.splitlines() if "net[head]" in line)
    cells = [cell.strip() for cell in row.split("│")[2:-1]]
    assert cells == ["net[head]", "dot", "s8 x s8 -> s32", "s32[32,128]", "10.2 kB", "16.4 kB"]
    assert "products: 1 integer, 0 float; 26.6 kB moved, 0 B of temporary memory" in text


def test_a_float_product_counts_as_float():
    table = lowering_table(compiled_case("float_convolution"))
    assert (table.integer_products, table.float_products) == (0, 1)
    assert [row.is_float for row in table.rows if row.products] == [True]
    assert "products: 0 integer, 1 float" in printed(compiled_case("float_convolution"))


def test_the_table_fits_a_narrow_terminal():
    text = printed(compiled_case("s8_convolution"), width=60)
    assert max(map(len, text.splitlines()[:-1])) <= 60
    assert "products: 1 integer, 0 float" in text


@for_targets(("tpu_v5e",))
def test_a_tpus_cycles_are_summed(target):
    compiled = compiled_case("s8_convolution", target.name)
    table = lowering_table(compiled)
    assert table.cycles == sum(row.cycles or 0 for row in table.rows) > 0
    assert f"about {table.cycles:,} cycles" in printed(compiled)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1234567, "1.23 MB")],
)
def test_sizes_have_three_digits(count, text):
    assert in_bytes(count) == text


def test_the_table_is_plain_data():
    table = lowering_table(compiled_case("s8_dot"))
    rows = dataclasses.asdict(table)["rows"]
    assert [row["what"] for row in rows] == ["dot", "elementwise"]
