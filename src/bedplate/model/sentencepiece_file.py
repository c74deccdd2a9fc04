"""A sentencepiece model (`tokenizer.model`) → its pieces, and a tokenizer that gives the ids that sentencepiece gives.

The file is a protobuf message. Only a few of its fields matter, so they are read here, without the package.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.pieces import SPACE, Kind, Piece, add_ends, add_special, tokenizer_of

FILE = "tokenizer.model"
_DAMAGED = "download it again"
_CONVERT = "make a tokenizer.json: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
# The classes of transformers that read such a file as it is, and the special tokens that they have by default.
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
_CLASSES = {
    **dict.fromkeys(("LlamaTokenizer", "LlamaTokenizerFast"), _LLAMA),
    **dict.fromkeys(("GemmaTokenizer", "GemmaTokenizerFast"), _GEMMA),
}
# Numbers of fields: of a model, a piece, the settings of the training, and those of normalization.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5
_BPE = 2


def read_sentencepiece(path: Path, settings: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and the special tokens by name that it has if the settings name none.

    settings: of tokenizer_config.json. Raises CheckpointError or UnsupportedError.
    """
    kind = settings.get("tokenizer_class")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise UnsupportedError(
            f"tokenizer_class = {kind!r} is not supported without a tokenizer.json", where=path, hint=_CONVERT
        )
    if settings.get("legacy") not in (None, True):
        raise UnsupportedError(
            "legacy = False is not supported without a tokenizer.json", where=path, hint=_CONVERT
        )
    pieces, prefix = _read(path)
    if len({piece.text for piece in pieces}) != len(pieces):
        raise CheckpointError("a piece is there twice", where=path, hint=_DAMAGED)
    tokenizer = tokenizer_of(pieces, prefix=prefix, where=path, hint=_DAMAGED)
    # Those of spaces are made by merges: spaces and ▁ are the same in sentencepiece, but not where tokens are matched.
    add_special(
        tokenizer, [piece for piece in pieces if piece.kind != Kind.USER_DEFINED or SPACE not in piece.text]
    )
    special, there = _CLASSES[kind], {piece.text for piece in pieces}
    before, behind = (_end(settings, name, default=special) for name in ("bos_token", "eos_token"))
    if missing := [one for one in (before, behind) if one is not None and one not in there]:
        raise CheckpointError(f"there is no piece {missing[0]!r}", where=path, hint=_DAMAGED)
    add_ends(tokenizer, before, behind)
    return tokenizer, {name: text for name, text in special.items() if text in there}


def _end(settings: Mapping[str, Any], name: str, *, default: Mapping[str, str]) -> str | None:
    """The token before a text or behind it; None: there is none."""
    if not settings.get(f"add_{name}", name == "bos_token"):
        return None
    value = settings.get(name, default[name])
    return value["content"] if isinstance(value, dict) else value  # type: ignore[no-any-return]


def _read(path: Path) -> tuple[list[Piece], bool]:
    """The pieces, and whether text begins with a space."""
    pieces, trainer, normalizer = [], dict[int, Any](), dict[int, Any]()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _PIECES:
                pieces.append(_piece(value))
            elif number == _TRAINER:
                trainer = dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(value))
    except (ValueError, TypeError, IndexError, KeyError, struct.error):
        raise CheckpointError("is not a whole sentencepiece model", where=path, hint=_DAMAGED) from None
    if not pieces:
        raise CheckpointError("is not a whole sentencepiece model", where=path, hint=_DAMAGED)
    wrong = {
        "it is not of the type BPE": trainer.get(_MODEL_TYPE) != _BPE,
        "it has no pieces for bytes": not trainer.get(_BYTE_FALLBACK),
        "it writes spaces behind words": trainer.get(_SUFFIX, 0),
        "it changes characters": normalizer.get(_CHARSMAP),
        "it removes spaces": normalizer.get(_REMOVE_EXTRA, 1),
        "it keeps spaces": not normalizer.get(_ESCAPE, 1),
    }
    if reason := next((reason for reason, is_so in wrong.items() if is_so), None):
        raise UnsupportedError(
            f"this sentencepiece model is not supported: {reason}", where=path, hint=_CONVERT
        )
    return pieces, bool(normalizer.get(_PREFIX, 1))


def _piece(message: bytes) -> Piece:
    values = dict(_fields(message))
    score = struct.unpack("<f", values[_SCORE])[0] if _SCORE in values else 0.0
    return Piece(values[_TEXT].decode("utf-8"), score, values.get(_KIND, Kind.NORMAL))


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
