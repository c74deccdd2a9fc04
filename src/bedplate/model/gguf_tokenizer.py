"""The tokenizer of a GGUF file.

The file carries vocabulary and merges, or scores, and *names* how text is split before: `gguf_split` says what a name
stands for, and other names are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import Fields
from bedplate.model.gguf_split import SPLITTINGS, Splitting
from bedplate.model.pieces import SPACE, Kind, Piece, add_ends, add_special, merging, tokenizer_of
from bedplate.model.tokenizer_source import TokenizerSource, token_ids

# Special tokens as a chat template names them, and as the fields of a GGUF do.
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Control tokens that end a turn, by their texts: llama.cpp does not write a field for each of them.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_USE_FOLDER = "use the model's Hugging Face folder, which has a tokenizer.json"
_DAMAGED = "the file is damaged: download it again"


def read_fields(fields: Mapping[str, Any], path: Path) -> TokenizerSource:
    """Raises CheckpointError or UnsupportedError, naming the field."""
    found = Fields({name.removeprefix("tokenizer."): value for name, value in fields.items()}, path)
    if found.get("ggml.tokens") is None or found.get("ggml.model") is None:
        raise CheckpointError("the GGUF holds no tokenizer", where=path, hint=_USE_FOLDER)
    pieces, tokenizer, begins = _tokenizer(found, fields.get("general.architecture") == "phi3")
    ids = {
        name: token_ids([found.get(f"ggml.{key}_token_id")], tokenizer, path) for name, key in _NAMED.items()
    }
    special = {name: pieces[found_ids[0]].text for name, found_ids in ids.items() if found_ids}
    _add_ends(tokenizer, found, special, ids, begins=begins)
    template = found.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise found.wrong("chat_template", "a text")
    ends = [found.get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends += [
        number
        for number, piece in enumerate(pieces)
        if piece.kind == Kind.CONTROL and piece.text in _TURN_ENDS
    ]
    return TokenizerSource(
        tokenizer=tokenizer,
        chat_template=template,
        bos_id=next(iter(ids["bos_token"]), None),
        eos_ids=token_ids(ends, tokenizer, path),
        special_tokens=special,
    )


def _tokenizer(found: Fields, is_phi3: bool) -> tuple[list[Piece], Tokenizer, bool]:
    """Its pieces, itself, and whether text begins with the first token where no field says so."""
    kind, split = found.get("ggml.model"), found.get("ggml.pre")
    if kind == "llama" and split in (None, "default"):
        pieces = _pieces(found, scored=True)
        return pieces, _sentencepiece(found, pieces, phi3=is_phi3), True
    if kind == "gpt2" and isinstance(split, str) and split in SPLITTINGS:
        pieces = _pieces(found, scored=False)
        return pieces, _byte_level(found, pieces, SPLITTINGS[split]), SPLITTINGS[split].begins
    raise UnsupportedError(
        f"the tokenizer {kind!r} with the pre-tokenizer {split!r} is not supported",
        where=found.where,
        hint=f"{_USE_FOLDER}; supported: llama, and gpt2 with {', '.join(SPLITTINGS)}",
    )


def _pieces(found: Fields, *, scored: bool) -> list[Piece]:
    tokens, types = _list(found, "ggml.tokens", str), _list(found, "ggml.token_type", int)
    scores = _list(found, "ggml.scores", float) if scored else [0.0] * len(tokens)
    for what, values in (("token types", types), ("scores", scores)):
        if len(values) != len(tokens):
            raise CheckpointError(
                f"{len(tokens)} tokens, but {len(values)} {what}", where=found.where, hint=_DAMAGED
            )
    return [Piece(*piece) for piece in zip(tokens, scores, types, strict=True)]


def _list(found: Fields, name: str, kind: type) -> list[Any]:
    value = found.get(name)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise found.wrong(name, f"a list of {kind.__name__}")
    return value


def _check_once(found: Fields, pieces: Sequence[Piece]) -> None:
    if len({piece.text for piece in pieces}) != len(pieces):
        raise CheckpointError("a token is there twice", where=found.where, hint=_DAMAGED)


def _byte_level(found: Fields, pieces: Sequence[Piece], splitting: Splitting) -> Tokenizer:
    _check_once(found, pieces)
    merges = [tuple(merge.split(" ")) for merge in _list(found, "ggml.merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError("a merge does not have two tokens", where=found.where, hint=_DAMAGED)
    tokenizer = merging(pieces, merges, where=Path(found.where), hint=_DAMAGED, ignore_merges=splitting.whole)
    if normalizer := splitting.normalizer():
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    add_special(tokenizer, pieces)
    return tokenizer


def _sentencepiece(found: Fields, pieces: Sequence[Piece], *, phi3: bool) -> Tokenizer:
    for name in ("ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap"):
        found.only(name, None, False, hint=_USE_FOLDER)
    prefix = found.flag("ggml.add_space_prefix", default=True)
    if not prefix:  # llama.cpp keeps what it matches whole as text, with spaces
        pieces = [
            replace(piece, text=piece.text.replace(" ", SPACE)) if piece.kind == Kind.USER_DEFINED else piece
            for piece in pieces
        ]
    _check_once(found, pieces)
    tokenizer = tokenizer_of(pieces, prefix=prefix, where=Path(found.where), hint=_DAMAGED)
    # So say the files of Phi 3; a GGUF does not, and llama.cpp goes by the name of the model.
    keep = ("<unk>", "<s>", "<|endoftext|>")
    strips = [piece.text for piece in pieces if phi3 and piece.text not in keep]
    add_special(tokenizer, pieces, strips=strips)
    return tokenizer


def _add_ends(
    tokenizer: Tokenizer,
    found: Fields,
    special: Mapping[str, str],
    ids: Mapping[str, tuple[int, ...]],
    *,
    begins: bool,
) -> None:
    """The first token before a text, and the last one behind it, where fields or the kind of the tokenizer say so."""
    adds = {
        name: found.flag(f"ggml.add_{key}_token", default=default)
        for name, key, default in (("bos_token", "bos", begins), ("eos_token", "eos", False))
    }
    for name, key in (("bos_token", "bos"), ("eos_token", "eos")):
        if adds[name] and not ids[name]:
            raise CheckpointError(
                f"text needs a token before or behind it, but there is no {key}_token_id",
                where=found.where,
                hint=f"add the field tokenizer.ggml.{key}_token_id",
            )
    before, behind = (special[name] if adds[name] else None for name in ("bos_token", "eos_token"))
    add_ends(tokenizer, before, behind)
