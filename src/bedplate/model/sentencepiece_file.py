"""A sentencepiece model (`tokenizer.model`) → its pieces and settings.

The file is a protobuf message. Only a few of its fields matter, so they are read here, without the package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bedplate.errors import CheckpointError
from bedplate.model.pieces import Kind, Piece

FILE = "tokenizer.model"
DAMAGED = "download it again"
UNIGRAM, BPE = 1, 2
# Numbers of fields: of a model, a piece, the settings of the training, and those of normalization.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_CHARSMAP, _PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5
# Of tokens with a name: the field of the id and what it is by default, and the same of the text.
_NAMED = {
    "unk_token": ((40, 0), (45, "<unk>")),
    "bos_token": ((41, 1), (46, "<s>")),
    "eos_token": ((42, 2), (47, "</s>")),
}


@dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """kind: UNIGRAM, BPE, or a number for another one. named: its special tokens by transformers' names.

    charsmap: how characters are replaced before all else; empty: they are not. prefix: text begins with a space.
    """

    pieces: list[Piece]
    kind: int
    byte_fallback: bool
    unk_id: int
    unk_piece: str
    named: dict[str, str]
    charsmap: bytes
    prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool


def read_sentencepiece(path: Path) -> SentencePiece:
    """Raises CheckpointError: the file is damaged."""
    try:
        found = _read(path.read_bytes())
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, struct.error):
        raise CheckpointError("is not a whole sentencepiece model", where=path, hint=DAMAGED) from None
    texts = {piece.text for piece in found.pieces}
    if not texts or "" in texts or not all(math.isfinite(piece.score) for piece in found.pieces):
        raise CheckpointError("is not a whole sentencepiece model", where=path, hint=DAMAGED)
    if len(texts) != len(found.pieces):
        raise CheckpointError("a piece is there twice", where=path, hint=DAMAGED)
    return found


def _read(data: bytes) -> SentencePiece:
    pieces, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number == _TRAINER:
            trainer |= dict(_fields(value))
        elif number == _NORMALIZER:
            normalizer |= dict(_fields(value))
    ids = {name: _signed(trainer.get(*number)) for name, (number, _) in _NAMED.items()}
    texts = {name: _text(trainer.get(*text)) for name, (_, text) in _NAMED.items()}
    return SentencePiece(
        pieces=pieces,
        kind=trainer.get(_MODEL_TYPE, UNIGRAM),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        unk_id=ids["unk_token"],
        unk_piece=texts["unk_token"],
        named={name: texts[name] or text for name, (_, (_, text)) in _NAMED.items() if ids[name] >= 0},
        charsmap=b"" + normalizer.get(_CHARSMAP, b""),  # TypeError: a number
        prefix=bool(normalizer.get(_PREFIX, 1)),
        remove_extra_spaces=bool(normalizer.get(_REMOVE_EXTRA, 1)),
        escape_spaces=bool(normalizer.get(_ESCAPE, 1)),
    )


def _piece(message: bytes) -> Piece:
    values = dict(_fields(message))
    score = struct.unpack("<f", values[_SCORE])[0] if _SCORE in values else 0.0
    return Piece(_text(values[_TEXT]), score, values.get(_KIND, Kind.NORMAL))


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("utf-8")


def _signed(number: int) -> int:
    """Of 32 bits, which are written as 64 where they are negative."""
    return (number & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: numbers of variable length as integers, all others as bytes. ValueError: damaged."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(wire)
        size, at = _varint(message, at) if wire == 2 else (4 if wire == 5 else 8, at)
        if at + size > len(message):
            raise ValueError(size)
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(shift)
