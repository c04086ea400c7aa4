"""Packing of narrow weight codes for files: four, two or one code per byte.

A 2-bit code takes 2 bits, a 3- or 4-bit code takes 4, a wider one takes 8. Codes are in two's
complement and row-major order, the first code in the lowest bits of its byte. Unused bits of the
last byte are zero.
"""

import math

import numpy as np
from jaxtyping import Int8, UInt8


def stored_bits(bits: int) -> int:
    """Return the bits that a code of width `bits` takes in a file: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` packed codes take."""
    return -(-count * stored_bits(bits) // 8)


def pack(codes: Int8[np.ndarray, "..."], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Pack codes into bytes.

    Args:
        codes: Codes in -2**(bits-1) .. 2**(bits-1) - 1.
        bits: Width of a code, 2 to 8.
    """
    width = stored_bits(bits)
    fields = np.zeros((packed_size(codes.size, bits), 8 // width), np.uint8)
    fields.reshape(-1)[: codes.size] = codes.reshape(-1).view(np.uint8) & (2**width - 1)
    return np.bitwise_or.reduce(fields << _shifts(width), axis=1)


def unpack(
    packed: UInt8[np.ndarray, " bytes"], shape: tuple[int, ...], bits: int
) -> Int8[np.ndarray, "..."]:
    """Unpack the codes from bytes that `pack` returned.

    Raises:
        ValueError: If the number of bytes is wrong, or unused bits are not zero.
    """
    width, count = stored_bits(bits), math.prod(shape)
    size = packed_size(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise ValueError(
            f"{count} codes of {bits} bits must be packed as uint8[{size}], got "
            f"{packed.dtype.name}{list(packed.shape)}."
        )
    fields = ((packed[:, None] >> _shifts(width)) & (2**width - 1)).reshape(-1)
    if fields[count:].any():
        raise ValueError(f"unused bits after {count} codes of {bits} bits must be zero.")
    sign = np.uint8(2 ** (width - 1))
    return ((fields[:count] ^ sign).astype(np.int16) - sign).astype(np.int8).reshape(shape)


def _shifts(width: int) -> np.ndarray:
    return np.arange(0, 8, width, dtype=np.uint8)
