"""A session in a file: its tokens, its keys and values, and what computed them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bedplate import _native
from bedplate.bundle import files, strict_json
from bedplate.errors import BundleError, NotFoundError, RunError
from bedplate.runtime import arguments
from bedplate.runtime.held import Held
from bedplate.runtime.prefix_cache import POSITIONS
from bedplate.runtime.weights import Precision, Weights

# MAGIC, the length of the header in 4 bytes, the header, 4 bytes for each token, the blocks, and the SHA-256 of all of
# this. Numbers are little-endian.
MAGIC = b"bedplate session"
VERSION = 2
_HASH_BYTES = 32
_MOST_HEADER = 1 << 16
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Header:
    """adapters: by name, each with its scale.  foundation, adapter, instruction_set: see weights.Content.

    positions: how many tokens have keys and values in the file, all or none.  block_bytes: of 64 positions.
    start: the first token that an activated LoRA computed. None: all of them have been computed alike.
    """

    version: int
    adapters: dict[str, float]
    foundation: str
    adapter: str
    instruction_set: str
    precision: Precision
    is_long: bool
    tokens: int
    positions: int
    block_bytes: int
    start: int | None


class Saved(NamedTuple):
    """What a session was. adapters: by name, each with its scale."""

    adapters: dict[str, float]
    held: Held


def save(path: str | Path, held: Held, weights: Weights, adapters: Mapping[str, float]) -> None:
    """Write what a session holds that uses these weights. RunError: the file cannot be written."""
    import hashlib

    count, by = len(held.tokens), held.computed_by
    start = None if weights.invocation is None or by is None or held.of_base == count else by.start
    is_long = by is not None and by.is_long
    own = _computing(weights, start).computed(is_long=is_long)
    kv = None if by is None or by.alike(own) < count else held.kv
    positions = 0 if kv is None else count
    header = Header(
        version=VERSION,
        adapters=dict(adapters),
        foundation=weights.content.foundation,
        adapter=weights.content.adapter,
        instruction_set=weights.content.instruction_set,
        precision=weights.precision,
        is_long=is_long,
        tokens=count,
        positions=positions,
        block_bytes=0 if kv is None else kv.block_nbytes,
        start=None if kv is None else start,
    )
    said = strict_json.dump(vars(header))
    hashed = hashlib.sha256()
    target = _path(path)
    try:
        with files.replacing(target) as file:
            pieces = (MAGIC, len(said).to_bytes(4, "little"), said, _packed(held.tokens))
            blocks = (kv.block(at).data for at in range(_blocks(positions)) if kv is not None)
            for piece in (*pieces, *blocks):
                hashed.update(piece)
                file.write(piece)
            file.write(hashed.digest())
    except OSError as error:
        raise RunError(
            f"the session cannot be saved: {error.strerror}",
            where=target,
            hint="is there such a folder, and room on the disk?",
        ) from error


def load(
    path: str | Path,
    weights_of: Callable[[Mapping[str, float]], Weights],
    reserve: Callable[[Sequence[tuple[_native.Kv, int, int]]], None],
    most: int,
) -> Saved:
    """Read a file that `save` wrote.

    weights_of: loads adapters by their names, each with its scale.  reserve: takes memory.  most: how many tokens a
    session can hold.
    NotFoundError: there is no such file, or no such adapter.  RunError: the file is damaged, is another one's, or does
    not fit the engine.
    """
    source = _path(path)
    with _opened(source) as file:
        size = _check_hash(file, source)
        header = _read_header(file, size, source)
        if header.tokens > most:
            raise RunError(
                f"{header.tokens} tokens do not fit the context of {most}",
                where=source,
                hint="give the engine a larger max_context",
            )
        adapters = arguments.adapters(header.adapters)
        weights = weights_of(adapters)
        _check_content(header, weights, source)
        tokens = _unpacked(_exactly(file, 4 * header.tokens, source))
        if any(token >= weights.vocab for token in tokens):
            raise _damaged("a token is not in the vocabulary", source)
        # Whatever a file says that it holds, no other session finds it: nobody else has this salt.
        held = Held(os.urandom(32).hex())
        held.tokens = tokens
        # Other kernels can give other bits: what theirs computed is computed again.
        if header.positions and header.instruction_set == weights.content.instruction_set:
            kv = weights.new_kv(header.is_long)
            if kv.block_nbytes != header.block_bytes:
                raise _damaged("its keys and values have another size", source)
            reserve([(kv, 0, header.positions)])
            for at in range(_blocks(header.positions)):
                end = min((at + 1) * POSITIONS, header.positions)
                kv.write(end, _exactly(file, header.block_bytes, source))
            held.take(_computing(weights, header.start), kv, tokens, is_long=header.is_long)
    return Saved(adapters, held)


def _computing(weights: Weights, start: int | None) -> Weights:
    """What computes a text that an activated LoRA computes from there on, or nowhere."""
    return weights.for_text([]) if start is None else weights.turned_on(start)


def _blocks(positions: int) -> int:
    return -(-positions // POSITIONS)


def _packed(tokens: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def _unpacked(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]


def _path(path: str | Path) -> Path:
    arguments.instance("path", path, (str, Path), "give the path of a file")
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:
        raise RunError(f"no file can have the path {str(path)!r}", hint="give the path of a file") from None
    return Path(path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """RunError: the file cannot be read."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise NotFoundError("there is no such file", where=path, hint="Session.save writes one") from error
    except OSError as error:
        raise RunError(
            f"the session cannot be read: {error.strerror}", where=path, hint="is it a file?"
        ) from error


def _check_hash(file: BinaryIO, path: Path) -> int:
    """How many bytes the hash covers, which the file ends with."""
    import hashlib

    size = os.fstat(file.fileno()).st_size - _HASH_BYTES
    if file.read(len(MAGIC)) != MAGIC:
        raise RunError("it is not a session", where=path, hint="Session.save writes one")
    hashed, left = hashlib.sha256(MAGIC), size - len(MAGIC)
    while left > 0 and (piece := file.read(min(_CHUNK, left))):
        hashed.update(piece)
        left -= len(piece)
    if left != 0 or file.read() != hashed.digest():
        raise _damaged("its SHA-256 is not the one at its end", path)
    file.seek(len(MAGIC))
    return size


def _read_header(file: BinaryIO, size: int, path: Path) -> Header:
    """size: of the file without its hash."""
    length = int.from_bytes(_exactly(file, 4, path), "little")
    if length > _MOST_HEADER:
        raise _damaged("its header is too long", path)
    try:
        fields = strict_json.load(_exactly(file, length, path), "header")
        if fields.get("version") != VERSION:
            raise RunError(
                f"format version {fields.get('version')!r}; this bedplate reads version {VERSION}",
                where=path,
                hint="load it with the bedplate that saved it",
            )
        header = strict_json.decode(Header, fields, "header")
    except BundleError as error:
        raise _damaged(f"{error.where}: {error.what}", path) from error
    counts = (header.tokens, header.positions, header.block_bytes, header.start or 0)
    if min(counts) < 0 or header.positions not in (0, header.tokens):
        raise _damaged("it counts tokens wrongly", path)
    if size != file.tell() + 4 * header.tokens + _blocks(header.positions) * header.block_bytes:
        raise _damaged("it is longer or shorter than it says", path)
    return header


def _check_content(header: Header, weights: Weights, path: Path) -> None:
    """RunError: something else computed what the file holds."""
    content = weights.content
    if header.foundation != content.foundation:
        raise _another("another foundation", "open the bundle that it was saved with", path)
    if header.adapter != content.adapter:
        names = " or ".join(map(repr, header.adapters))
        what = f"another adapter of the name {names}" if names else "other adapters, or none,"
        raise _another(what, "add the adapter that it was saved with", path)
    if header.start is not None and weights.invocation is None:
        raise _damaged("its adapter is no activated LoRA", path)
    if header.precision != weights.precision:
        what = f"an engine with kv={header.precision!r}"
        raise _another(what, f"make the engine with kv={header.precision!r}", path)


def _another(what: str, hint: str, path: Path) -> RunError:
    return RunError(f"{what} computed this session", where=path, hint=hint)


def _damaged(what: str, path: Path) -> RunError:
    return RunError(
        f"the session is damaged: {what}", where=path, hint="restore it from a copy, or save it again"
    )


def _exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise _damaged("it is shorter than it says", path)
    return data
