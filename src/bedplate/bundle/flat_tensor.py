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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

SCALAR_TYPES = {"uint8": 0, "int8": 1, "int64": 4, "float16": 5, "float32": 6, "bfloat16": 15}
_ITEM_BYTES = {"uint8": 1, "int8": 1, "int64": 8, "float16": 2, "float32": 4, "bfloat16": 2}
_DTYPES = {code: name for name, code in SCALAR_TYPES.items()}


# A file may refer to the same bytes many times. So what one reference can make of them is bounded.
_LONGEST_KEY = 1 << 10
_MOST_DIMS = 16  # as ExecuTorch's
_MOST_FIELDS = 3  # of a table, from its first on: what is used here


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
    table = reader.tables([root])
    ((stored,), (named,)) = (reader.vectors(table, slot, 4) for slot in (1, 2))
    tables = reader.tables(reader.targets(stored))
    segments = [*map(Segment, *(reader.numbers(_U64, tables.places(slot)) for slot in (0, 1)))]
    tables = reader.tables(reader.targets(named))
    keys, indices = reader.strings(tables, 0), reader.numbers(_U32, tables.places(1))
    entries = dict(zip(keys, zip(indices, reader.layouts(tables, 2), strict=True), strict=True))
    if len(entries) != len(keys):
        raise MalformedError(f"key {Counter(keys).most_common(1)[0][0]} stands twice")
    for key, index in zip(keys, indices, strict=True):
        if index >= len(segments):
            raise MalformedError(f"key {key}: segment {index} of {len(segments)}")
    if any(version := reader.numbers(_U32, table.places(0))):
        raise MalformedError(f"version {version[0]}, not 0")
    return segments, entries


_I8, _U16, _I32, _U32, _U64 = (struct.Struct(kind).unpack_from for kind in ("<b", "<H", "<i", "<I", "<Q"))
_Unpack = Callable[[bytes, int], tuple[int, ...]]


class _Tables(NamedTuple):
    """Tables of one kind: where each begins, and where its fields are from there on."""

    starts: Sequence[int]
    fields: Sequence[tuple[int, ...]]

    def places(self, slot: int) -> list[int]:
        """Where a field of each is; 0 where it has its default."""
        return [
            start + fields[slot] if slot < len(fields) and fields[slot] else 0
            for start, fields in zip(self.starts, self.fields, strict=True)
        ]


class _Reader:
    """Reads one field of many tables at a time: a file has a thousand. struct.error: it does not lie within the
    buffer.
    """

    def __init__(self, buffer: bytes) -> None:
        self._buffer = buffer

    def tables(self, starts: Sequence[int]) -> _Tables:
        vtables = [start - _I32(self._buffer, start)[0] for start in starts]
        fields = {vtable: self._fields(vtable) for vtable in {*vtables}}  # tables of one form share them
        return _Tables(starts, [fields[vtable] for vtable in vtables])

    def _fields(self, vtable: int) -> tuple[int, ...]:
        if vtable < 0:  # would count from the end
            raise MalformedError(f"refers to byte {vtable}")
        end = vtable + min(_U16(self._buffer, vtable)[0], 4 + 2 * _MOST_FIELDS)
        return tuple(_U16(self._buffer, position)[0] for position in range(vtable + 4, end, 2))

    def numbers(self, unpack: _Unpack, places: Sequence[int]) -> list[int]:
        """The numbers at these places. 0: it has its default, 0."""
        return [unpack(self._buffer, place)[0] if place else 0 for place in places]

    def vectors(self, tables: _Tables, slot: int, stride: int, most: int | None = None) -> list[range]:
        """Where the items of a vector of each table lie. most: how many it may have."""
        found = [*map(self._vector, tables.starts, tables.places(slot), repeat(slot), repeat(stride))]
        if most is not None and (longest := max(map(len, found), default=0)) > most:
            raise MalformedError(f"a vector of {longest} items, where no more than {most} are known")
        return found

    def _vector(self, table: int, place: int, slot: int, stride: int) -> range:
        if not place:
            raise MalformedError(f"the table at byte {table} lacks its field {slot}")
        start = place + _U32(self._buffer, place)[0] + 4
        length = _U32(self._buffer, start - 4)[0]
        if start + length * stride > len(self._buffer):
            raise MalformedError(f"{length} items at byte {start - 4} reach beyond the end")
        return range(start, start + length * stride, stride)

    def targets(self, references: Iterable[int]) -> list[int]:
        """What the references at these places refer to."""
        return [place + _U32(self._buffer, place)[0] for place in references]

    def strings(self, tables: _Tables, slot: int) -> list[str]:
        try:
            return [
                str(self._buffer[at.start : at.stop], "ascii")
                for at in self.vectors(tables, slot, 1, _LONGEST_KEY)
            ]
        except UnicodeDecodeError as error:
            raise MalformedError("a key is not text") from error

    def layouts(self, tables: _Tables, slot: int) -> list[Layout | None]:
        places = tables.places(slot)
        found = iter(self._layouts(self.tables(self.targets(filter(None, places)))))
        return [next(found) if place else None for place in places]

    def _layouts(self, tables: _Tables) -> Iterator[Layout]:
        codes = self.numbers(_I8, tables.places(0))
        for code, sizes, order in zip(
            codes, self.vectors(tables, 1, 4, _MOST_DIMS), self.vectors(tables, 2, 1, _MOST_DIMS), strict=True
        ):
            shape = tuple(_I32(self._buffer, place)[0] for place in sizes)
            dims = [*self._buffer[order.start : order.stop]]
            if code not in _DTYPES or dims != [*range(len(shape))] or any(size < 0 for size in shape):
                raise MalformedError(f"a layout of type {code}, sizes {shape}, order {dims}")
            yield Layout(dtype=_DTYPES[code], shape=shape)
