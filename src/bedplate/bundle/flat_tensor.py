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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def encode(segments: Sequence[Segment], entries: Mapping[str, tuple[int, Layout | None]]) -> bytes:
    """The index as a flatbuffer. entries: key → (number of its segment, layout); written in the order of
    keys.
    """
    import flatbuffers  # imports numpy, which whoever only reads an index does without

    builder = flatbuffers.Builder(1024)
    segment_tables = [
        _table(builder, 2, {0: ("Uint64", s.offset), 1: ("Uint64", s.nbytes)}) for s in segments
    ]
    entry_tables = [_entry_table(builder, key, *entries[key]) for key in sorted(entries)]
    segment_vector = _vector(builder, segment_tables)
    entry_vector = _vector(builder, entry_tables)
    root = _table(
        builder, 3, {1: ("UOffsetTRelative", segment_vector), 2: ("UOffsetTRelative", entry_vector)}
    )
    builder.Finish(root, file_identifier=b"FT01")
    return bytes(builder.Output())


def _entry_table(builder: Any, key: str, segment: int, layout: Layout | None) -> int:
    fields = {0: ("UOffsetTRelative", builder.CreateString(key)), 1: ("Uint32", segment)}
    if layout is not None:
        import numpy as np

        sizes = builder.CreateNumpyVector(np.asarray(layout.shape, np.int32))
        order = builder.CreateNumpyVector(np.arange(len(layout.shape), dtype=np.uint8))
        slots = {
            0: ("Int8", SCALAR_TYPES[layout.dtype]),
            1: ("UOffsetTRelative", sizes),
            2: ("UOffsetTRelative", order),
        }
        fields[2] = ("UOffsetTRelative", _table(builder, 3, slots))
    return _table(builder, 3, fields)


def _table(builder: Any, slots: int, fields: Mapping[int, tuple[str, int]]) -> int:
    """A flatbuffer table: slot → (kind of the flatbuffers builder, value)."""
    builder.StartObject(slots)
    for slot, (kind, value) in fields.items():
        getattr(builder, f"Prepend{kind}Slot")(slot, value, 0)
    return int(builder.EndObject())


def _vector(builder: Any, tables: list[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())


def decode(buffer: bytes, root: int) -> tuple[list[Segment], dict[str, tuple[int, Layout | None]]]:
    """What `encode` was given. root: where the root table starts. Raises MalformedError and nothing else."""
    reader = _Reader(buffer)
    tables = map(reader.indirect, reader.run(root, 1, 4))
    segments = [Segment(offset=reader.scalar(_U64, t, 0), nbytes=reader.scalar(_U64, t, 1)) for t in tables]
    entries: dict[str, tuple[int, Layout | None]] = {}
    for table in map(reader.indirect, reader.run(root, 2, 4)):
        key = reader.string(table, 0)
        index = reader.scalar(_U32, table, 1)
        if key in entries:
            raise MalformedError(f"key {key} stands twice")
        if index >= len(segments):
            raise MalformedError(f"key {key}: segment {index} of {len(segments)}")
        entries[key] = (index, reader.layout(table))
    if reader.scalar(_U32, root, 0) != 0:
        raise MalformedError(f"version {reader.scalar(_U32, root, 0)}, not 0")
    return segments, entries


_I8, _U8, _U16, _I32, _U32, _U64 = (struct.Struct(kind) for kind in ("<b", "<B", "<H", "<i", "<I", "<Q"))


class _Reader:
    """Reads flatbuffer tables and checks that every access lies within the buffer."""

    def __init__(self, buffer: bytes) -> None:
        self._buffer = buffer
        self._fields: dict[int, tuple[int, ...]] = {}  # by vtable, which tables of one form share

    def at(self, kind: struct.Struct, position: int) -> int:
        try:
            number: int = kind.unpack_from(self._buffer, position)[0]
        except struct.error as error:
            raise MalformedError(f"refers to byte {position} of {len(self._buffer)}") from error
        return number

    def indirect(self, position: int) -> int:
        return position + self.at(_U32, position)

    def field(self, table: int, slot: int) -> int | None:
        """Where the field is; None where it has its default."""
        vtable = table - self.at(_I32, table)
        if vtable < 0:  # would count from the end
            raise MalformedError(f"refers to byte {vtable} of {len(self._buffer)}")
        starts = self._fields.get(vtable)
        if starts is None:
            end = vtable + self.at(_U16, vtable)
            starts = tuple(self.at(_U16, position) for position in range(vtable + 4, end, 2))
            self._fields[vtable] = starts
        return table + starts[slot] if slot < len(starts) and starts[slot] else None

    def scalar(self, kind: struct.Struct, table: int, slot: int) -> int:
        position = self.field(table, slot)
        return 0 if position is None else self.at(kind, position)

    def run(self, table: int, slot: int, stride: int) -> range:
        """Where the items of a vector lie."""
        position = self.field(table, slot)
        if position is None:
            raise MalformedError(f"the table at byte {table} lacks its field {slot}")
        start = self.indirect(position) + 4
        length = self.at(_U32, start - 4)
        if start + length * stride > len(self._buffer):
            raise MalformedError(f"{length} items at byte {start - 4} reach beyond the end")
        return range(start, start + length * stride, stride)

    def string(self, table: int, slot: int) -> str:
        where = self.run(table, slot, 1)
        try:
            return self._buffer[where.start : where.stop].decode("ascii")
        except UnicodeDecodeError as error:
            raise MalformedError(f"the table at byte {table}: its key is not text") from error

    def layout(self, entry: int) -> Layout | None:
        position = self.field(entry, 2)
        if position is None:
            return None
        table = self.indirect(position)
        code = self.scalar(_I8, table, 0)
        shape = tuple(self.at(_I32, position) for position in self.run(table, 1, 4))
        order = [self.at(_U8, position) for position in self.run(table, 2, 1)]
        if code not in _DTYPES or order != list(range(len(shape))) or any(size < 0 for size in shape):
            raise MalformedError(f"a layout of type {code}, sizes {shape}, order {order}")
        return Layout(dtype=_DTYPES[code], shape=shape)
