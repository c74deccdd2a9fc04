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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import flatbuffers
import numpy as np

SCALAR_TYPES = {"uint8": 0, "int8": 1, "int64": 4, "float16": 5, "float32": 6, "bfloat16": 15}
_ITEM_BYTES = {"uint8": 1, "int8": 1, "int64": 8, "float16": 2, "float32": 4, "bfloat16": 2}
_DTYPES = {code: name for name, code in SCALAR_TYPES.items()}
_T = TypeVar("_T")


class MalformedError(Exception):
    """The bytes are not an index; says where it stopped making sense."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a constant that a program holds as a tensor lies in memory: contiguous, outermost dim first."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Segment:
    offset: int
    nbytes: int


def encode(segments: Sequence[Segment], entries: Mapping[str, tuple[int, Layout | None]]) -> bytes:
    """The index as a flatbuffer. entries: key → (number of its segment, layout); written in the order of
    keys.
    """
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
    tables = reader.vector(root, 1, 4, reader.indirect)
    segments = [Segment(offset=reader.scalar("<Q", t, 0), nbytes=reader.scalar("<Q", t, 1)) for t in tables]
    entries: dict[str, tuple[int, Layout | None]] = {}
    for table in reader.vector(root, 2, 4, reader.indirect):
        key = reader.string(table, 0)
        index = reader.scalar("<I", table, 1)
        if key in entries:
            raise MalformedError(f"key {key} stands twice")
        if index >= len(segments):
            raise MalformedError(f"key {key}: segment {index} of {len(segments)}")
        entries[key] = (index, reader.layout(table))
    if reader.scalar("<I", root, 0) != 0:
        raise MalformedError(f"version {reader.scalar('<I', root, 0)}, not 0")
    return segments, entries


class _Reader:
    """Reads flatbuffer tables and checks that every access lies within the buffer."""

    def __init__(self, buffer: bytes) -> None:
        self._buffer = buffer

    def at(self, kind: str, position: int) -> int:
        if not 0 <= position <= len(self._buffer) - struct.calcsize(kind):
            raise MalformedError(f"refers to byte {position} of {len(self._buffer)}")
        return int(struct.unpack_from(kind, self._buffer, position)[0])

    def indirect(self, position: int) -> int:
        return position + self.at("<I", position)

    def field(self, table: int, slot: int) -> int | None:
        """Where the field is; None where it has its default."""
        vtable = table - self.at("<i", table)
        entry = 4 + 2 * slot
        start = self.at("<H", vtable + entry) if entry < self.at("<H", vtable) else 0
        return table + start if start else None

    def scalar(self, kind: str, table: int, slot: int) -> int:
        position = self.field(table, slot)
        return 0 if position is None else self.at(kind, position)

    def vector(self, table: int, slot: int, stride: int, item: Callable[[int], _T]) -> list[_T]:
        position = self.field(table, slot)
        if position is None:
            raise MalformedError(f"the table at byte {table} lacks its field {slot}")
        start = self.indirect(position)
        length = self.at("<I", start)
        if start + 4 + length * stride > len(self._buffer):
            raise MalformedError(f"{length} items at byte {start} reach beyond the end")
        return [item(start + 4 + i * stride) for i in range(length)]

    def string(self, table: int, slot: int) -> str:
        try:
            return bytes(self.vector(table, slot, 1, lambda p: self._buffer[p])).decode("ascii")
        except UnicodeDecodeError as error:
            raise MalformedError(f"the table at byte {table}: its key is not text") from error

    def layout(self, entry: int) -> Layout | None:
        position = self.field(entry, 2)
        if position is None:
            return None
        table = self.indirect(position)
        code = self.scalar("<b", table, 0)
        shape = self.vector(table, 1, 4, lambda p: self.at("<i", p))
        order = self.vector(table, 2, 1, lambda p: self.at("<B", p))
        if code not in _DTYPES or order != list(range(len(shape))) or any(size < 0 for size in shape):
            raise MalformedError(f"a layout of type {code}, sizes {shape}, order {order}")
        return Layout(dtype=_DTYPES[code], shape=tuple(shape))
