"""What a session holds: tokens, and the keys and values that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bedplate import _native
from bedplate.runtime.prefix_cache import POSITIONS, digests
from bedplate.runtime.weights import Computed, Weights


class State(NamedTuple):
    """What a session held. Its lists are still there: they only grow, or others take their place."""

    tokens: list[int]
    length: int
    kv: _native.Kv | None
    computed_by: Computed | None
    root: str
    chain: list[str]


class Held:
    """salt: what the cache keeps is found only by sessions that have the same."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.tokens: list[int] = []
        self.kv: _native.Kv | None = None
        self.computed_by: Computed | None = None
        self._root = ""  # the digest of what computes the tokens
        self._chain: list[str] = []  # digests of the full blocks

    def fork(self) -> Held:
        """The same, in the same memory."""
        other = Held(self.salt)
        other.tokens, other._chain = list(self.tokens), list(self._chain)
        if self.kv is not None and self.computed_by is not None:
            other.kv, other.computed_by = self.kv.fork(len(self.tokens)), self.computed_by
            other._root = self._root
        return other

    @property
    def state(self) -> State:
        return State(self.tokens, len(self.tokens), self.kv, self.computed_by, self._root, list(self._chain))

    def restore(self, state: State) -> None:
        """Hold what was held then. Steps that failed since have written beyond that at most."""
        del state.tokens[state.length :]
        self.tokens, _, self.kv, self.computed_by, self._root, self._chain = state

    @property
    def computing(self) -> _native.Kv:
        """Where the keys and values of its next tokens go, once `begin` or `extend` has made ready for them."""
        assert self.kv is not None
        return self.kv

    def weights_for(self, weights: Weights, ids: Sequence[int]) -> Weights:
        """What computes the text that is held, with `ids` after it."""
        return weights if weights.invocation is None else weights.for_text([*self.tokens, *ids])

    @property
    def of_base(self) -> int:
        """How many of the tokens the base computed."""
        return 0 if self.computed_by is None else min(len(self.tokens), self.computed_by.of_base)

    def keep_of_base(self) -> None:
        """Hold no more than the base computed."""
        self._cut(self.of_base)

    def serves(self, weights: Weights, length: int) -> int:
        """How many of the keys and values are those of a text of `length` tokens with these weights."""
        if self.kv is None or self.computed_by is None:
            return 0
        return min(len(self.tokens), self.computed_by.alike(_computed(weights, length)))

    def clear(self, weights: Weights, length: int) -> None:
        """Hold nothing, to compute a text of `length` tokens from its beginning."""
        is_long = weights.is_long(length)
        self.take(weights, weights.new_kv(is_long), [], is_long=is_long)

    def take(self, weights: Weights, kv: _native.Kv, tokens: list[int], *, is_long: bool) -> None:
        """Hold what these weights computed of a text, long or not."""
        self.tokens, self.kv, self._chain = tokens, kv, []
        self.computed_by = weights.computed(is_long=is_long)
        self._root = weights.root(self.salt, is_long=is_long)

    def extend(self, weights: Weights, ids: Sequence[int], length: int) -> list[int]:
        """Make ready to append tokens to a text that is to have `length`. Returns those that are to be computed: also
        what other weights computed before, and nothing that the cache has.
        """
        count = len(self.tokens) + len(ids)
        as_before = self.kv is not None and self.computed_by == _computed(weights, length)
        if as_before and count // POSITIONS == len(self.tokens) // POSITIONS:
            return list(ids)  # they fill no block, and the cache has only full ones
        text = [*self.tokens, *ids]
        return text[self.begin(weights, text, length) :]

    def begin(self, weights: Weights, text: list[int], length: int) -> int:
        """Hold the longest beginning of a text that is known, here or in the cache, but never its last token. Returns
        how many tokens that is.
        """
        most = len(text) - 1
        serves = self.serves(weights, length)
        own = min(_common_prefix(self.tokens, text), most, serves) if serves else 0
        if not own:
            self.clear(weights, length)
        else:
            self._cut(own)
            self.computed_by = _computed(weights, length)
        return self.find(weights, text, length)

    def _cut(self, count: int) -> None:
        """Hold the first tokens only. The others may stay in the lists of a `State`."""
        if count < len(self.tokens):
            # Of a file there can be tokens alone. What can fail is first.
            kept = None if self.kv is None else self.kv.fork(count)
            self._chain, self.tokens, self.kv = self._chain[: count // POSITIONS], self.tokens[:count], kept

    def find(self, weights: Weights, text: list[int], length: int) -> int:
        """Hold more of a text, whose beginning is held, if the cache has it. Returns how many tokens are held then."""
        chain = self._chain
        before = chain[-1] if chain else self._root
        found = weights.cache.find(digests(before, text, len(chain), weights.turn))
        count = min((len(chain) + len(found)) * POSITIONS, len(text) - 1)
        if not found or count <= len(self.tokens):
            return len(self.tokens)
        assert self.kv is not None
        blocks = [*map(self.kv.block, range(len(chain))), *found.values()]
        self.kv = weights.new_kv(weights.is_long(length), blocks, count)
        self.tokens, self._chain = text[:count], [*chain, *found][: count // POSITIONS]
        return count

    def next_block(self, weights: Weights, text: list[int]) -> str | None:
        """The digest of the block of a text to be computed next. None: the text ends in it, or there is no cache."""
        if not weights.cache.budget:
            return None
        before = self._chain[-1] if self._chain else self._root
        return next(digests(before, text, len(self._chain), weights.turn), None)

    def append(self, weights: Weights, tokens: Sequence[int]) -> None:
        """Hold tokens whose keys and values are there now. The cache gets the blocks that are full."""
        self.tokens += tokens
        first = len(self._chain)
        if len(self.tokens) // POSITIONS == first or not weights.cache.budget:
            return
        assert self.kv is not None
        before = self._chain[-1] if first else self._root
        self._chain += digests(before, self.tokens, first, weights.turn)
        weights.cache.put(self._chain, self.kv)


def _computed(weights: Weights, length: int) -> Computed:
    return weights.computed(is_long=weights.is_long(length))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that both share."""
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
