"""Look-ups in tables, in ONNX's terms."""

import numpy as np

from jaxqat.errors import ExportError
from jaxqat.export._onnx.builder import Builder
from jaxqat.export._onnx.grids import UINT8_MAX
from jaxqat.integer.graph import CODE_MIN, Quantize, Table

_INT32 = 6  # ONNX's element type.


def of_pixels(builder: Builder, node: Quantize, images: str, offset: int) -> str:
    """Write the lookup of pixels in the table of codes, at entry 256 * channel + pixel.

    Args:
        builder: The ONNX graph so far.
        node: The quantization of the network's input.
        images: Name of the uint8 images.
        offset: The output's uint8 codes minus its int8 codes.

    Raises:
        ExportError: If the node has no table.
    """
    if node.table is None:
        raise ExportError(
            f"node {node.name!r}: the network has no table for uint8 images; use input='float', or "
            "convert with `preprocess`."
        )
    table = (node.table.astype(np.int16) + offset).astype(np.uint8)
    index = builder.add("Cast", [images], "pixel", to=_INT32)
    if (table == table[:, :1]).all():
        table = table[:, 0]
    else:
        first = builder.constant(256 * np.arange(table.shape[1], dtype=np.int32), "first_entry")
        index = builder.add("Add", [index, first], "entry")
    entries = builder.constant(table.T.ravel(), "table")
    return builder.add("Gather", [entries, index], f"{node.output}/codes")


def of_codes(builder: Builder, node: Table, x: str, offsets: tuple[int, int], rank: int) -> str:
    """Write the lookup of codes in a table, or in one for each channel.

    Args:
        builder: The ONNX graph so far.
        node: The table.
        x: Name of the uint8 codes, channels first.
        offsets: Uint8 codes minus int8 codes, of the input and of the output.
        rank: Rank of the codes, the batch included.
    """
    codes = np.arange(UINT8_MAX + 1) - offsets[0]  # In the order of uint8 codes.
    entries = node.table[np.clip(codes - CODE_MIN, 0, UINT8_MAX)].astype(np.int16)
    stored = (entries + offsets[1]).astype(np.uint8)
    index = builder.add("Cast", [x], f"{node.name}/index", to=_INT32)
    if stored.ndim == 2:  # A table for each channel, one behind the other.
        channels = np.arange(stored.shape[1], dtype=np.int32)
        first = builder.constant(
            (256 * channels).reshape(-1, *[1] * (rank - 2)), f"{node.name}/first_entry"
        )
        index = builder.add("Add", [index, first], f"{node.name}/entry")
    table = builder.constant(stored.T.ravel(), f"{node.name}/entries")
    return builder.add("Gather", [table, index], f"{node.output}/codes")
