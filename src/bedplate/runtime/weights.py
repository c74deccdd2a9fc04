"""Weights that compute a session's tokens: what they are, and which keys and values are theirs."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

from bedplate import _native
from bedplate.errors import UnsupportedError
from bedplate.runtime.prefix_cache import PrefixCache, Turn, digest

Precision = Literal["float16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("float16", "float32")
BASE = "base"  # in place of an adapter's digest: it is none


class Content(NamedTuple):
    """What weights are. load: one load of the foundation. foundation, adapter ("base": none): digests of all that
    their files say. instruction_set: of the kernels, which can give other bits.
    """

    load: object
    foundation: str
    adapter: str
    instruction_set: str


class Computed(NamedTuple):
    """What computed keys and values: only the same goes on with them. scale: of the adapter's branches.

    is_long: as those of a long text.  start: the first position that the adapter computed. The base computed those
    before, which is more than none if it is an activated LoRA.
    """

    content: Content
    scale: float
    is_long: bool
    start: int = 0

    @property
    def of_base(self) -> int:
        """How many positions the base computes, of a text of any length."""
        return sys.maxsize if self.content.adapter == BASE else self.start

    def alike(self, other: Computed) -> int:
        """How many positions of a text both compute in the same way."""
        if self == other:
            return sys.maxsize
        if self._base() != other._base():
            return 0
        return min(self.of_base, other.of_base)

    def _base(self) -> Computed:
        return Computed(self.content._replace(adapter=BASE), 1.0, self.is_long)


class Limits(NamedTuple):
    """max_rows: how many tokens one step takes.  max_context: how many positions a session can hold.  vocab: how many
    token ids the base has.
    """

    max_rows: int
    max_context: int
    vocab: int


class Weights(NamedTuple):
    """The weights that compute the tokens of a session. adapter None: the base.

    content: what they are. They do not use keys and values that other content computed.
    cache: of the keys and values that they, and all weights of the same foundation, computed.
    precision: of the keys and values of a session.
    long_above: a text with more tokens is a long one. All its tokens turn by other frequencies. None: no text is.
    vocab: how many tokens they know.  layers: the base's layers that tokens go through. None: each once. Tokens of one
        native step have the same.
    scale: what the adapter's branches are multiplied by.  unscalable: what the adapter has that has no scale. None: it
        can be scaled.  unsummable: what it has that cannot be added to other adapters. None: it can be added.
    invocation: what turns an activated LoRA on: `for_text` comes before anything is computed. None: it is on, or it is
        none.  start: the first position that the adapter computes. The base computes those before.
    """

    decoder: _native.Decoder
    adapter: _native.Adapter | None
    content: Content
    cache: PrefixCache
    precision: Precision
    long_above: int | None
    vocab: int
    layers: tuple[int, ...] | None
    scale: float = 1.0
    unscalable: str | None = None
    unsummable: str | None = None
    invocation: tuple[int, ...] | None = None
    start: int = 0

    def for_text(self, tokens: Sequence[int]) -> Weights:
        """What computes a text of these tokens, and all that follows. As in PEFT, an activated LoRA is on from the
        last place where its invocation begins. If it is nowhere, the base computes the text.
        """
        if self.invocation is None:
            return self
        start = last_place(self.invocation, tokens)
        if start is None:
            content = self.content._replace(adapter=BASE)
            return self._replace(adapter=None, content=content, scale=1.0, invocation=None)
        return self.turned_on(start)

    def turned_on(self, start: int) -> Weights:
        """An activated LoRA that is on from this position."""
        return self._replace(invocation=None, start=start)

    def at(self, position: int) -> tuple[_native.Adapter | None, float]:
        """The adapter that computes a position of a text, and its scale."""
        assert self.invocation is None, "for_text() comes first"
        return (None, 1.0) if position < self.start else (self.adapter, self.scale)

    file: str = ""

    @property
    def nbytes(self) -> int:
        """How many bytes the adapter's own weights take in memory."""
        return 0 if self.adapter is None else self.adapter.nbytes

    def is_long(self, length: int) -> bool:
        """Whether a text of so many tokens is a long one."""
        return self.long_above is not None and length > self.long_above

    def new_kv(self, is_long: bool, blocks: Sequence[_native.KvBlock] = (), positions: int = 0) -> _native.Kv:
        """For a text, which is a long one or not. blocks: what holds its first `positions`."""
        return self.decoder.kv(self.precision == "float16", self.adapter, is_long, blocks, positions)

    def computed(self, *, is_long: bool) -> Computed:
        """What the keys and values of a text, long or not, are computed by."""
        assert self.invocation is None, "for_text() comes first"
        return Computed(self.content, self.scale, is_long, self.start)

    def root(self, salt: str, *, is_long: bool) -> str:
        """The digest of all that the keys and values of a text, long or not, depend on, but for its tokens, up to the
        `turn`.
        """
        assert self.invocation is None, "for_text() comes first"
        return digest(
            foundation=self.content.foundation,
            **(_by(BASE, 1.0) if self.start else _by(self.content.adapter, self.scale)),
            precision=self.precision,
            text="long" if is_long else "short",
            salt=salt,
        )

    def habit(self, salt: str) -> str:
        """The digest of what answers depend on, but for their texts: of what can be alike."""
        return digest(foundation=self.content.foundation, **_by(self.content.adapter, self.scale), salt=salt)

    @property
    def turn(self) -> Turn | None:
        """Where the adapter takes over from the base. None: nowhere within a text."""
        by = digest(**_by(self.content.adapter, self.scale))
        return Turn(self.start, by) if self.start else None

    def scaled(self, scale: float) -> Weights:
        """With the adapter's branches times `scale`. UnsupportedError: it has something that no scale is known for."""
        if scale != 1 and self.unscalable is not None:
            raise UnsupportedError(
                f"the adapter has {self.unscalable}, which a scale does not fit",
                hint="use it without a scale; adapters of A and B alone can have one",
            )
        return self._replace(scale=scale)


def _by(adapter: str, scale: float) -> dict[str, str | bytes]:
    return {"adapter": adapter, "scale": struct.pack("<f", scale)}


def last_place(wanted: tuple[int, ...], tokens: Sequence[int]) -> int | None:
    """Where tokens stand in a text for the last time. None: they do not."""
    for start in range(len(tokens) - len(wanted), -1, -1):
        if tokens[start] == wanted[0] and tuple(tokens[start : start + len(wanted)]) == wanted:
            return start
    return None
