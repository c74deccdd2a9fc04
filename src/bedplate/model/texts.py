"""A long text as sequences of tokens, each of which a model reads as a text of its own. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


def sequences(tokens: Sequence[int], length: int, start: Sequence[int] = ()) -> list[list[int]]:
    """Tokens cut into runs, each a text of its own of up to `length` tokens that begins with `start`."""
    step = max(1, length - len(start))
    return [[*start, *tokens[at : at + step]] for at in range(0, len(tokens), step)]


def texts_of(tokenizer: Tokenizer, text: str, length: int, *, most: int | None = None) -> list[list[int]]:
    """The first `most` tokens of a text, in sequences of up to `length`. One that predicts nothing is left out.

    Each begins as the tokenizer begins a text: a model that always read `bos` first computes nonsense without it.
    """
    tokens, letter = (tokenizer.encode(part, add_special_tokens=False).ids for part in (text, "a"))
    begun = tokenizer.encode("a").ids
    before = next((at for at in range(len(begun)) if begun[at : at + len(letter)] == letter), 0)
    return [one for one in sequences(tokens[:most], length, begun[:before]) if len(one) > 1]
