"""Blocks of keys and values by what they were computed from, so that no text is computed twice."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain as chained
from typing import NamedTuple

from bedplate import _native
from bedplate.hashing import sha256_of_few

POSITIONS = 64  # of a block, as the native layer has it


def digest(**parts: str | bytes) -> str:
    """SHA-256 of named parts. Each is written with its length, so two different lists never give the same bytes."""
    pieces = chained.from_iterable(parts.items())
    encoded = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    return sha256_of_few(b"".join(len(piece).to_bytes(8, "little") + piece for piece in encoded))


class Turn(NamedTuple):
    """Where in a text something else begins to compute. by: the digest of what does."""

    position: int
    by: str


def digests(before: str, tokens: Sequence[int], first: int, turn: Turn | None = None) -> Iterator[str]:
    """Of each full block of a text, from block `first` on. Each covers all tokens up to its end.

    before: of the block before, or of what computes the text.  turn: from there on, something else computes it.
    """
    for start in range(first * POSITIONS, len(tokens) - POSITIONS + 1, POSITIONS):
        if turn is not None and start <= turn.position < start + POSITIONS:
            before = digest(before=before, turn=turn.position.to_bytes(8, "little"), by=turn.by)
        block = array("Q", tokens[start : start + POSITIONS])
        before = digest(before=before, tokens=block.tobytes())
        yield before


class PrefixCache:
    """Blocks of one loaded foundation and its adapters, each under the digest of its text. When it is full, it drops
    the block that was not used for longest. You can call it from any thread.

    budget: bytes that all blocks may take. 0: it keeps none.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._blocks: dict[str, _native.KvBlock] = {}  # least recently used first
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of its blocks, also of those that sessions hold too."""
        return sum(block.nbytes for block in list(self._blocks.values()))

    @property
    def own_nbytes(self) -> int:
        """Of the blocks that nothing else holds. It waits for nothing, so that it can be asked at any time."""
        return sum(block.nbytes for block in list(self._blocks.values()) if not block.is_shared)

    def find(self, names: Iterator[str]) -> dict[str, _native.KvBlock]:
        """Blocks that follow each other in a text, up to the first that is not there, by the digests of the text."""
        found: dict[str, _native.KvBlock] = {}
        with self._lock:
            for name in names if self._blocks else ():
                block = self._blocks.get(name)
                if block is None:
                    break
                found[name] = block
            self._use(found)
        return found

    def put(self, names: Sequence[str], kv: _native.Kv) -> None:
        """Keep all full blocks of a text. names: their digests."""
        with self._lock:
            blocks = {name: self._blocks.get(name) or kv.block(at) for at, name in enumerate(names)}
            self._use(blocks)
            over = self.nbytes - self.budget
            for name in list(self._blocks) if over > 0 else ():
                if over <= 0:
                    break
                over -= self._blocks.pop(name).nbytes

    def evict(self, nbytes: int) -> int:
        """Drop blocks that nothing else holds, until this frees so many bytes. Returns how many it freed."""
        with self._lock:
            freed = 0
            for name, block in list(self._blocks.items()):
                if freed >= nbytes:
                    break
                if not block.is_shared:
                    freed += block.nbytes
                    del self._blocks[name]
            return freed

    def _use(self, blocks: dict[str, _native.KvBlock]) -> None:
        """They are the last to be dropped, and of them the end of the text is the first."""
        for name in reversed(blocks):
            self._blocks.pop(name, None)
            self._blocks[name] = blocks[name]
