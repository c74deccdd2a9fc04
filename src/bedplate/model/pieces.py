"""The pieces of a sentencepiece model of the type BPE → a tokenizer that gives the same ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from bedplate.errors import CheckpointError

SPACE = "▁"


class Kind(IntEnum):
    """Of a piece, by the numbers that sentencepiece and llama.cpp have for it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


def tokenizer_of(pieces: Sequence[Piece], *, prefix: bool, where: Path, hint: str) -> Tokenizer:
    """prefix: text begins with a space, and so does what follows a special token.

    CheckpointError: no tokenizer can be of these pieces.
    """
    tokenizer = merging(
        pieces,
        merges_of(pieces, user_defined=not prefix),
        where=where,
        hint=hint,
        unk_token=next((piece.text for piece in pieces if piece.kind == Kind.UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=True,
    )
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merging(
    pieces: Sequence[Piece], merges: list[tuple[str, str]], *, where: Path, hint: str, **options: Any
) -> Tokenizer:
    """A tokenizer that only merges. options: of the library's BPE.

    CheckpointError: no tokenizer can be of these pieces and merges.
    """
    try:
        model = models.BPE(
            vocab={piece.text: number for number, piece in enumerate(pieces)}, merges=merges, **options
        )
    except Exception as error:  # the library raises Exception itself, for whatever is wrong
        raise CheckpointError(f"not a tokenizer: {error}", where=where, hint=hint) from None
    return Tokenizer(model)


def merges_of(pieces: Sequence[Piece], *, user_defined: bool) -> list[tuple[str, str]]:
    """The pairs that are merged, the best first: by the score of what they make, and then in transformers' order.

    user_defined: those pieces are merged too, before all others. Gemma has them for white space of any length.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL}
    if user_defined:
        scores |= {piece.text: 0.0 for piece in pieces if piece.kind == Kind.USER_DEFINED}
    at = {piece.text: number for number, piece in enumerate(pieces) if piece.text in scores}
    found = []
    for text, number in at.items():
        for length in range(1, len(text)):
            left, right = text[:length], text[length:]
            if left in at and right in at:
                order = (-scores[text], -length, -len(right), number)
                found.append((order, left, right))
    return [(left, right) for _, left, right in sorted(found)]


def add_special(tokenizer: Tokenizer, pieces: Sequence[Piece], *, strips: Collection[str] = ()) -> None:
    """What is matched whole in the text. Control tokens are left out of what is decoded for people.

    strips: those that take the white space behind them.
    """
    for special, kinds in ((True, (Kind.CONTROL, Kind.UNKNOWN)), (False, (Kind.USER_DEFINED,))):
        tokens = [
            AddedToken(piece.text, special=special, normalized=False, rstrip=piece.text in strips)
            for piece in pieces
            if piece.kind in kinds
        ]
        if special:
            tokenizer.add_special_tokens(tokens)
        else:
            tokenizer.add_tokens(tokens)


def add_ends(tokenizer: Tokenizer, before: str | None, behind: str | None) -> None:
    """Put tokens before each text and behind it."""
    ends = [one for one in (before, behind) if one is not None]
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[one for one in (before, "$A", behind) if one is not None],
            pair=[one for one in (before, "$A", behind, before, "$B", behind) if one is not None],
            special_tokens=[(one, tokenizer.token_to_id(one)) for one in ends],
        )
