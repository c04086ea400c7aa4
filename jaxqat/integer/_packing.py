"""Weight codes of few bits in the bytes of a file: four, two, or one to a byte.

A code of 2 bits takes 2 bits, one of 3 or 4 bits takes 4, any wider one a byte. Codes stand in
row-major order, in two's complement, the first in the lowest bits of its byte; what is left of the
last byte is zero.
"""

import math

import numpy as np
from jaxtyping import Int8, UInt8


def stored_bits(bits: int) -> int:
    """Bits that a code of so many bits takes in a file: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def packed_size(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-count * stored_bits(bits) // 8)


def pack(codes: Int8[np.ndarray, "..."], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of codes.

    Args:
        codes: In -2**(bits-1) .. 2**(bits-1) - 1.
        bits: Width of a code, 2 to 8.
    """
    width = stored_bits(bits)
    fields = np.zeros((packed_size(codes.size, bits), 8 // width), np.uint8)
    fields.reshape(-1)[: codes.size] = codes.reshape(-1).view(np.uint8) & (2**width - 1)
    return np.bitwise_or.reduce(fields << _shifts(width), axis=1)


def unpack(
    packed: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], bits: int
) -> Int8[np.ndarray, "..."]:
    """The codes that `pack` made bytes of.

    Raises:
        ValueError: There are more or fewer bytes than such codes take, or bits behind the last
            code are not zero.
    """
    width, count = stored_bits(bits), math.prod(shape)
    right = packed_size(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (right,):
        raise ValueError(
            f"{count} codes of {bits} bits are uint8[{right}], got "
            f"{packed.dtype.name}{list(packed.shape)}."
        )
    fields = ((packed[:, None] >> _shifts(width)) & (2**width - 1)).reshape(-1)
    if fields[count:].any():
        raise ValueError(f"behind its {count} codes of {bits} bits, the last byte is not zero.")
    sign = np.uint8(2 ** (width - 1))
    return ((fields[:count] ^ sign).astype(np.int16) - sign).astype(np.int8).reshape(shape)


def _shifts(width: int) -> np.ndarray:
    return np.arange(0, 8, width, dtype=np.uint8)
