"""The index of an ExecuTorch data file: a flatbuffer with this schema, encoded and decoded.

    FlatTensor   {version: u32, segments: [DataSegment], named_data: [NamedData]}     file identifier "FT01"
    DataSegment  {offset: u64, size: u64}          offset counts from the first segment
    NamedData    {key: string, segment_index: u32, tensor_layout: TensorLayout}
    TensorLayout {scalar_type: i8, sizes: [i32], dim_order: [u8]}

A table starts with an i32: the distance back to its vtable, u16s that give its size, the table's size, and
where in the table each field is (0: it has the default). Strings, vectors and tables are referred to by a
u32: the distance forward from the reference.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

SCALAR_TYPES = {"uint8": 0, "int8": 1, "int64": 4, "float16": 5, "float32": 6, "bfloat16": 15}
_ITEM_BYTES = {"uint8": 1, "int8": 1, "int64": 8, "float16": 2, "float32": 4, "bfloat16": 2}
_DTYPES = {code: name for name, code in SCALAR_TYPES.items()}


class MalformedError(Exception):
    """The bytes are not an index; says where it stopped making sense."""


class Layout(NamedTuple):
    """How a constant that a program holds as a tensor lies in memory: contiguous, outermost dim first."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


class Segment(NamedTuple):
    offset: int
    nbytes: int


# Every table of a kind has the same fields at the same places, so one vtable serves all of them.
_VTABLES = {
    "root": (12, (0, 4, 8)),  # the version is 0, the default
    "segment": (24, (8, 16)),
    "entry": (16, (4, 8, 12)),
    "entry without layout": (12, (4, 8)),
    "layout": (16, (4, 8, 12)),
}


def encode(segments: Sequence[Segment], entries: Mapping[str, tuple[int, Layout | None]]) -> bytes:
    """The index as a flatbuffer. entries: key → (number of its segment, layout); written in the order of
    keys.
    """
    return _Writer().index(segments, entries)


class _Writer:
    """Writes tables one behind the other. What a table refers to comes after it, its vtable before it."""

    def __init__(self) -> None:
        self._out = bytearray(b"\0\0\0\0FT01")
        self._vtables = {}
        for kind, (size, fields) in _VTABLES.items():
            self._vtables[kind] = len(self._out)
            self._out += struct.pack(f"<{2 + len(fields)}H", 4 + 2 * len(fields), size, *fields)

    def index(self, segments: Sequence[Segment], entries: Mapping[str, tuple[int, Layout | None]]) -> bytes:
        root = self._table("root", "4x4x")
        self._refer(0, root)
        tables = self._vector(root + 4, len(segments))
        for place, segment in zip(tables, segments, strict=True):
            self._refer(place, self._table("segment", "4xQQ", segment.offset, segment.nbytes))
        tables = self._vector(root + 8, len(entries))
        for place, key in zip(tables, sorted(entries), strict=True):
            self._refer(place, self._entry(key, *entries[key]))
        return bytes(self._out)

    def _entry(self, key: str, segment: int, layout: Layout | None) -> int:
        if layout is None:
            table = self._table("entry without layout", "4xI", segment)
        else:
            table = self._table("entry", "4xI4x", segment)
            self._refer(table + 12, self._layout(layout))
        self._refer(table + 4, self._bytes(key.encode("ascii"), end=b"\0"))
        return table

    def _layout(self, layout: Layout) -> int:
        table = self._table("layout", "b3x4x4x", SCALAR_TYPES[layout.dtype])
        sizes = struct.pack(f"<{len(layout.shape)}i", *layout.shape)
        self._refer(table + 8, self._bytes(sizes, count=len(layout.shape)))
        self._refer(table + 12, self._bytes(bytes(range(len(layout.shape)))))
        return table

    def _align(self, to: int) -> int:
        self._out += bytes(-len(self._out) % to)
        return len(self._out)

    def _table(self, kind: str, fields: str, *values: int) -> int:
        table = self._align(8)
        self._out += struct.pack(f"<i{fields}", table - self._vtables[kind], *values)
        return table

    def _vector(self, reference: int, count: int) -> range:
        """Where the references of a vector of tables are to be."""
        start = self._bytes(bytes(4 * count), count=count)
        self._refer(reference, start)
        return range(start + 4, start + 4 + 4 * count, 4)

    def _bytes(self, data: bytes, *, count: int | None = None, end: bytes = b"") -> int:
        """A vector of `count` items (None: of bytes)."""
        start = self._align(4)
        self._out += struct.pack("<I", len(data) if count is None else count) + data + end
        return start

    def _refer(self, place: int, to: int) -> None:
        struct.pack_into("<I", self._out, place, to - place)


def decode(buffer: bytes, root: int) -> tuple[list[Segment], dict[str, tuple[int, Layout | None]]]:
    """What `encode` was given. root: where the root table starts. Raises MalformedError and nothing else."""
    try:
        return _decode(_Reader(buffer), root)
    except struct.error as error:  # of every access that does not lie within the buffer
        raise MalformedError(f"refers to a byte beyond its {len(buffer)}") from error


def _decode(reader: _Reader, root: int) -> tuple[list[Segment], dict[str, tuple[int, Layout | None]]]:
    table = reader.table(root)
    segments = [Segment(reader.u64(one, 0), reader.u64(one, 1)) for one in reader.tables(table, 1)]
    entries: dict[str, tuple[int, Layout | None]] = {}
    for one in reader.tables(table, 2):
        key, index = reader.string(one, 0), reader.u32(one, 1)
        if key in entries:
            raise MalformedError(f"key {key} stands twice")
        if index >= len(segments):
            raise MalformedError(f"key {key}: segment {index} of {len(segments)}")
        entries[key] = (index, reader.layout(one))
    if version := reader.u32(table, 0):
        raise MalformedError(f"version {version}, not 0")
    return segments, entries


_I8, _U8, _U16, _I32, _U32, _U64 = (
    struct.Struct(kind).unpack_from for kind in ("<b", "<B", "<H", "<i", "<I", "<Q")
)
_Table = tuple[int, tuple[int, ...]]  # where it begins, and where its fields are from there on


class _Reader:
    """Reads the fields of tables by their slots. struct.error: a field does not lie within the buffer."""

    def __init__(self, buffer: bytes) -> None:
        self._buffer = buffer
        self._fields: dict[int, tuple[int, ...]] = {}  # by vtable, which tables of one form share

    def table(self, start: int) -> _Table:
        vtable = start - _I32(self._buffer, start)[0]
        fields = self._fields.get(vtable)
        if fields is None:
            if vtable < 0:  # would count from the end
                raise MalformedError(f"refers to byte {vtable}")
            end = vtable + _U16(self._buffer, vtable)[0]
            fields = tuple(_U16(self._buffer, position)[0] for position in range(vtable + 4, end, 2))
            self._fields[vtable] = fields
        return start, fields

    @staticmethod
    def field(table: _Table, slot: int) -> int:
        """Where the field is; 0 where it has its default."""
        start, fields = table
        return start + fields[slot] if slot < len(fields) and fields[slot] else 0

    def u32(self, table: _Table, slot: int) -> int:
        position = self.field(table, slot)
        return _U32(self._buffer, position)[0] if position else 0

    def u64(self, table: _Table, slot: int) -> int:
        position = self.field(table, slot)
        return _U64(self._buffer, position)[0] if position else 0

    def vector(self, table: _Table, slot: int, stride: int) -> range:
        """Where the items of a vector lie."""
        position = self.field(table, slot)
        if not position:
            raise MalformedError(f"the table at byte {table[0]} lacks its field {slot}")
        start = position + _U32(self._buffer, position)[0] + 4
        length = _U32(self._buffer, start - 4)[0]
        if start + length * stride > len(self._buffer):
            raise MalformedError(f"{length} items at byte {start - 4} reach beyond the end")
        return range(start, start + length * stride, stride)

    def tables(self, table: _Table, slot: int) -> Iterator[_Table]:
        """The tables of a vector."""
        for position in self.vector(table, slot, 4):
            yield self.table(position + _U32(self._buffer, position)[0])

    def string(self, table: _Table, slot: int) -> str:
        where = self.vector(table, slot, 1)
        try:
            return self._buffer[where.start : where.stop].decode("ascii")
        except UnicodeDecodeError as error:
            raise MalformedError(f"the table at byte {table[0]}: its key is not text") from error

    def layout(self, entry: _Table) -> Layout | None:
        position = self.field(entry, 2)
        if not position:
            return None
        table = self.table(position + _U32(self._buffer, position)[0])
        at = self.field(table, 0)
        code = _I8(self._buffer, at)[0] if at else 0
        shape = tuple(_I32(self._buffer, position)[0] for position in self.vector(table, 1, 4))
        order = [_U8(self._buffer, position)[0] for position in self.vector(table, 2, 1)]
        if code not in _DTYPES or order != list(range(len(shape))) or any(size < 0 for size in shape):
            raise MalformedError(f"a layout of type {code}, sizes {shape}, order {order}")
        return Layout(dtype=_DTYPES[code], shape=shape)
