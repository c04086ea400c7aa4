"""Reading the arrays of a saved network from an archive, of which nothing is trusted.

`numpy.load` inflates every member that it is asked for, whatever its size. Here a member is never
inflated, since `save` compresses none; only members that the graph names are read, and none makes
an array larger than its own bytes.
"""

import io
import zipfile
from collections.abc import Collection

import numpy as np

_SUFFIX = ".npy"
_MAX_HEADER = 10_000


def read_arrays(
    content: bytes, names: Collection[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the named arrays of an archive that `numpy.savez` wrote.

    Returns:
        The arrays by name, and the names of all other members, which are not read.

    Raises:
        ValueError: If a member is compressed, occurs twice or is no array of numbers. On damage,
            `zipfile` and NumPy raise many other types.
    """
    by_member = {f"{name}{_SUFFIX}": name for name in names}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > len(content):
            raise ValueError("its members are larger than the file.")
        _check_members(members)
        known = [member for member in members if member.filename in by_member]
        arrays = {by_member[member.filename]: _array(archive.read(member)) for member in known}
    return arrays, tuple(m.filename for m in members if m.filename not in by_member)


def _check_members(members: Collection[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename!r} is compressed; `save` compresses none.")
        if member.filename in seen:
            raise ValueError(f"{member.filename!r} occurs twice.")
        seen.add(member.filename)


def _array(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array has an unknown version of NumPy's format.")
    header = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_HEADER)
    shape, is_fortran, dtype = header
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded.")
    values = np.frombuffer(data, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if is_fortran else "C").copy(order="K")
