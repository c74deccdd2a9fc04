"""ExecuTorch data files (`.ptd`, "FlatTensor"): constants under keys, written and read without torch.

    0    u32   where the root table of the index starts
    4    4s    "FT01"
    8    4s    "FH01"
    12   u32   40: bytes of this header, from "FH01" on
    16   u64   48: where the rest of the index starts
    24   u64   bytes of the index without this header
    32   u64   where the segments start
    40   u64   bytes of all segments, with the padding between them
    48   8s    zeros
    56   …     the rest of the index (see flat_tensor.py)
    …    …     the segments, each at a multiple of 128 and padded with zeros

Integers are little-endian. The header stands inside the index, after its first 8 bytes.

The writer is deterministic: keys in ascending order, segments in the order in which constants arrive, equal
bytes once. Segments start at multiples of 128: ExecuTorch's own default, a multiple of the 16 that XNNPACK
asks for, and no vector load straddles a cache line that it need not. (The memory-mapping loader takes any
offset.)
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from bedplate.bundle import files, flat_tensor
from bedplate.bundle.flat_tensor import Layout, Segment
from bedplate.bundle.manifest import ConstantInfo
from bedplate.errors import BundleError, NotFoundError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bedplate.constants import Constant

ALIGNMENT = 128
_HEADER = struct.Struct("<4sIQQQQ8x")
_HEADER_OFFSET = 8
_HEADER_LENGTH = 40  # the zeros are not counted
_LARGEST_INDEX = 1 << 24  # of some 70,000 constants; it takes thirty times as much memory to read


class Entry(NamedTuple):
    """One key of a data file. offset: of its bytes, from the start of the file; keys with equal bytes share
    them.
    """

    key: str
    offset: int
    nbytes: int
    layout: Layout | None


class Ptd(NamedTuple):
    """A data file whose index has been read and checked."""

    path: Path
    entries: Mapping[str, Entry]

    def data(self, key: str) -> NDArray[np.uint8]:
        """The bytes of `key`: uint8 [nbytes], memory-mapped, read-only. NotFoundError: it has no such key."""
        import numpy as np

        entry = self.entries.get(key)
        if entry is None:
            raise NotFoundError(f"no constant has the key {key}", where=self.path)
        if entry.nbytes == 0:
            return np.empty(0, np.uint8)  # nothing cannot be mapped
        return np.memmap(self.path, np.uint8, "r", entry.offset, (entry.nbytes,))


def write_ptd(
    path: Path, constants: Iterable[Constant], *, leave_out: Collection[str] = ()
) -> tuple[ConstantInfo, ...]:
    """Write a data file; it appears in full or not at all. Returns what it holds, ordered by name.

    Constants are taken one at a time and each goes to disk at once, so memory is bounded by the largest.
    leave_out: keys that another file of the bundle holds; ExecuTorch refuses two files that share one.
    """
    import shutil
    import tempfile  # both take longer to import than an index to read

    draft = _Draft()
    # The index precedes the segments in the file but is known only after them: they wait in an unnamed file.
    with files.naming(path), tempfile.TemporaryFile(dir=path.parent) as spool:
        for constant in constants:
            if constant.key not in leave_out:
                draft.add(constant, spool)
        spool.seek(0)
        with files.replacing(path) as file:
            file.write(draft.head())
            shutil.copyfileobj(spool, file, 1 << 20)
    return tuple(sorted(draft.infos, key=lambda info: (info.name, info.key)))


def describe(constant: Constant) -> ConstantInfo:
    """What a manifest says of a constant."""
    return ConstantInfo(
        name=constant.name,
        key=constant.key,
        dtype=constant.dtype,
        shape=constant.shape,
        layout=constant.layout,
        scales=None if constant.scales is None else constant.scales.key,
        nbytes=constant.nbytes,
    )


class _Draft:
    """What the index will say, gathered constant by constant."""

    def __init__(self) -> None:
        self.infos: set[ConstantInfo] = set()
        self._segments: list[Segment] = []
        self._entries: dict[str, tuple[int, Layout | None]] = {}  # key → number of its segment, layout
        self._by_digest: dict[bytes, int] = {}  # SHA-256 of the bytes → number of the segment

    def add(self, constant: Constant, spool: IO[bytes]) -> None:
        number = self._number(constant.data, spool)
        layout = Layout(dtype=constant.dtype, shape=constant.shape) if constant.is_tensor else None
        known = self._entries.setdefault(constant.key, (number, layout))
        assert known == (number, layout), (
            f"{constant.name}: the key {constant.key} names something else already"
        )
        assert layout is None or layout.nbytes == constant.nbytes, f"{constant.name}: {constant.nbytes} bytes"
        self.infos.add(describe(constant))

    def _number(self, data: NDArray[np.uint8], spool: IO[bytes]) -> int:
        """The segment that holds `data`, appended to the spool if it is new."""
        from hashlib import sha256  # see hashing.py: whoever only reads does without

        digest = sha256(data.data).digest()
        if digest not in self._by_digest:
            start = _aligned(self._end())
            spool.write(bytes(start - self._end()))
            spool.write(data.data)
            self._by_digest[digest] = len(self._segments)
            self._segments.append(Segment(offset=start, nbytes=data.nbytes))
        return self._by_digest[digest]

    def _end(self) -> int:
        return self._segments[-1].offset + self._segments[-1].nbytes if self._segments else 0

    def head(self) -> bytes:
        """Everything before the first segment."""
        index = flat_tensor.encode(self._segments, self._entries)
        start = _aligned(_HEADER.size + len(index))
        header = _HEADER.pack(b"FH01", _HEADER_LENGTH, _HEADER.size, len(index), start, self._end())
        (root,) = struct.unpack_from("<I", index)
        moved = struct.pack("<I", root + _HEADER.size) + index[4:_HEADER_OFFSET]
        return (moved + header + index[_HEADER_OFFSET:]).ljust(start, b"\0")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def read_ptd(path: Path) -> Ptd:
    """Read and check the index of a data file; the data stay on disk. BundleError: it is not a whole data
    file.
    """
    try:
        with path.open("rb") as file:
            return Ptd(path=path, entries=_read_index(file, path.stat().st_size))
    except FileNotFoundError as error:
        hint = "restore it from a copy, or write it again: bedplate build or bedplate add"
        raise NotFoundError("no such data file", where=path, hint=hint) from error
    except flat_tensor.MalformedError as error:
        hint = "it is damaged or cut short: restore it from a copy, or write it again"
        raise BundleError(f"not a whole data file: {error}", where=path, hint=hint) from error


def _read_index(file: IO[bytes], file_bytes: int) -> dict[str, Entry]:
    head = file.read(_HEADER_OFFSET + _HEADER.size)
    if len(head) < _HEADER_OFFSET + _HEADER.size:
        raise flat_tensor.MalformedError(f"it has only {file_bytes} bytes")
    root, magic = struct.unpack_from("<I4s", head)
    header_magic, length, offset, index_bytes, start, data_bytes = _HEADER.unpack_from(head, _HEADER_OFFSET)
    if (magic, header_magic, length) != (b"FT01", b"FH01", _HEADER_LENGTH):
        raise flat_tensor.MalformedError("it does not begin with FT01 and FH01")
    if not offset + index_bytes <= start <= start + data_bytes <= file_bytes:
        raise flat_tensor.MalformedError(
            f"its header tells of {start + data_bytes} bytes, of which the index has {offset + index_bytes}; "
            f"the file has {file_bytes}"
        )
    if offset + index_bytes > _LARGEST_INDEX:
        raise flat_tensor.MalformedError(
            f"its index ends at byte {offset + index_bytes}, after {_LARGEST_INDEX}"
        )
    file.seek(0)
    segments, entries = flat_tensor.decode(file.read(offset + index_bytes), root)
    checked = {}
    for key, (number, layout) in entries.items():
        segment = segments[number]
        if segment.offset + segment.nbytes > data_bytes:
            raise flat_tensor.MalformedError(f"key {key} reaches beyond its segments")
        if layout is not None and layout.nbytes != segment.nbytes:
            raise flat_tensor.MalformedError(f"key {key}: {layout} does not take {segment.nbytes} bytes")
        checked[key] = Entry(key, start + segment.offset, segment.nbytes, layout)
    return checked
