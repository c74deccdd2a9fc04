"""Finds constants by name, for computing with them: checks their sizes and separates joined ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bedplate.bundle.manifest import ConstantInfo
from bedplate.bundle.ptd import Entry, read_ptd
from bedplate.errors import BundleError
from bedplate.hashing import sha256_of
from bedplate.names import CODES, DIAGONAL, SCALES, nbytes_of, parts_of, way_of


class Source(NamedTuple):
    """Bytes [offset, offset + size) of an open file. The order is that of the native layer's `Source`."""

    file: int
    offset: int
    size: int

    def slice(self, first: int, size: int) -> Source:
        """Bytes [first, first + size) of these."""
        return Source(self.file, self.offset + first, size)


class Part(NamedTuple):
    """A matrix as its constants store it. The order is that of the native layer's `Constants`.

    bits: 4, 8, or 32 for floats.  group: columns that share a scale; 0: a scale for each row, or none.
    """

    rows: int
    columns: int
    bits: int
    group: int
    codes: Source
    scales: Source

    def slice(self, first: int, rows: int) -> Part:
        """Rows [first, first + rows)."""
        codes, scales = self.codes.size // self.rows, self.scales.size // self.rows
        return self._replace(
            rows=rows,
            codes=self.codes.slice(first * codes, rows * codes),
            scales=self.scales.slice(first * scales, rows * scales),
        )


_NOTHING = Source(0, 0, 0)
_BITS = {"int4": 4, "uint8": 4, "int8": 8, "float32": 32}  # uint8: an embedding's two codes a byte


class NamedConstants:
    """The constants of one data file by name. It says where they lie, and keeps the file open.

    A constant that is joined of several goes by the name of each of them.
    beside: where constants are that `infos` name and this file does not hold.
    BundleError, here and below: the file is damaged, or does not hold what `infos` say.
    """

    def __init__(
        self, path: Path, infos: Sequence[ConstantInfo], *, beside: NamedConstants | None = None
    ) -> None:
        self.path, self._beside = path, beside
        self._entries = read_ptd(path).entries
        self._infos = {info.name: info for info in infos}
        # Of a constant, or of codes: what holds them, by each name that they have.
        self._holders = dict[str, str]()
        self._joined = dict[str, tuple[str, ...]]()
        for name in self._infos:
            parts = tuple(part.removesuffix(CODES) for part in parts_of(name))
            self._holders.update(dict.fromkeys(parts, name))
            if len(parts) > 1:
                self._joined[name] = parts
        self._read: set[str] = set()
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> NamedConstants:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, sha256: str) -> None:
        """BundleError: the open file has another SHA-256."""
        if sha256_of(self._file) != sha256:
            hint = "the file was changed or damaged: restore it from a copy, or add the adapter again"
            raise BundleError("its SHA-256 is not the one in bundle.json", where=self.path, hint=hint)

    def check_all_read(self) -> None:
        """BundleError: something in `infos` was not asked for, so that it would have no effect."""
        unread = min(self._infos.keys() - self._read, default=None)
        if unread is not None:
            raise self._wrong(unread, "this bedplate does not compute a constant of this name here")

    def has(self, name: str) -> bool:
        """True if there is a constant of this name, or a matrix of codes and scales."""
        return name in self._holders

    def joined_with(self, name: str) -> tuple[str, ...]:
        """The names of everything that is in one constant with `name`, in its order."""
        return self._joined.get(self._holders.get(name, name)) or (name,)

    def before_on_diagonal(self, name: str) -> tuple[str, ...]:
        """The matrices that come before `name` on the diagonal that joins them. None, if it is not joined so."""
        if way_of(self._holders.get(name, name)) != DIAGONAL:
            return ()
        names = self.joined_with(name)
        return names[: names.index(name)]

    def same_bytes(self, one: str, other: str) -> bool:
        """True if two matrices have the same codes and scales, at the same place on disk."""
        return all(
            one + part in self._infos
            and other + part in self._infos
            and self._entry(self._info(one + part))[1:3] == self._entry(self._info(other + part))[1:3]
            for part in (CODES, SCALES)
        )

    def keys_of(self, name: str) -> tuple[str, str]:
        """The keys of the codes and of the scales of a matrix."""
        return self._info(name + CODES).key, self._info(name + SCALES).key

    def floats(self, name: str, count: int) -> Source:
        """Where `count` float32 numbers are: the whole constant that holds `name`."""
        info = self._info(self._holders.get(name, name))
        if info.dtype != "float32" or info.nbytes != 4 * count:
            raise self._wrong(
                name, f"it has {info.nbytes} bytes of {info.dtype}, not {count} float32 numbers"
            )
        return self._source(info)

    def ids(self, name: str) -> Source:
        """Where the int64 numbers are that `name` holds."""
        info = self._info(name)
        if info.dtype != "int64" or len(info.shape) != 1:
            raise self._wrong(name, f"it has dtype {info.dtype} and shape {info.shape}, not int64 [tokens]")
        return self._source(info)

    def matrix(self, name: str) -> Part:
        """The matrix that holds `name`, of floats or of codes and scales."""
        holder = self._holders.get(name, name)
        codes = self._info(holder)
        if len(codes.shape) != 2 or codes.dtype not in _BITS or 0 in codes.shape:
            raise self._wrong(
                codes.name,
                f"it has dtype {codes.dtype} and shape {codes.shape}, which is no matrix of weights",
            )
        rows, columns = codes.shape[0], codes.shape[1] * (2 if codes.dtype == "uint8" else 1)
        if codes.dtype == "float32":
            return Part(rows, columns, 32, 0, self._source(codes), _NOTHING)
        scales = self._info(holder.removesuffix(CODES) + SCALES)
        per_row = scales.shape[1] if len(scales.shape) == 2 else 1
        if scales.shape[:1] != (rows,) or per_row < 1 or columns % per_row:
            raise self._wrong(
                scales.name, f"its shape {scales.shape} does not fit codes of shape {codes.shape}"
            )
        in_groups = scales.dtype == "bfloat16" or per_row > 1
        group = columns // per_row if in_groups else 0
        return Part(rows, columns, _BITS[codes.dtype], group, self._source(codes), self._source(scales))

    def _info(self, name: str) -> ConstantInfo:
        info = self._infos.get(name)
        if info is None:
            raise self._wrong(name, "there is no constant of this name")
        self._read.add(name)
        return info

    def _source(self, info: ConstantInfo) -> Source:
        if self._beside is not None and info.key not in self._entries:
            return self._beside._source(info)
        entry = self._entry(info)
        if not entry.nbytes == info.nbytes == nbytes_of(info.dtype, info.shape):
            raise self._wrong(
                info.name,
                f"the file has {entry.nbytes} bytes for it, and its list says {info.nbytes} "
                f"({info.dtype}, shape {info.shape})",
            )
        return Source(self._file.fileno(), entry.offset, entry.nbytes)

    def _entry(self, info: ConstantInfo) -> Entry:
        entry = self._entries.get(info.key)
        if entry is None:
            raise self._wrong(info.name, f"the file has no key {info.key}")
        return entry

    def _wrong(self, name: str, what: str) -> BundleError:
        hint = "bedplate verify BUNDLE checks every file; restore it from a copy, or write it again"
        return BundleError(f"constant {name}: {what}", where=self.path, hint=hint)
