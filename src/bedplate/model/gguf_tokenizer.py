"""The tokenizer of a GGUF file.

The file carries vocabulary and merges and *names* how text is split before them; what a name stands for is the table
`_PRE_TOKENIZERS`, and other names are refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import Fields
from bedplate.model.tokenizer_source import TokenizerSource, token_ids

# What the table says is what the model's own tokenizer.json says, and llama.cpp does for the name.
_PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
# Special tokens as a chat template names them, and as the fields of a GGUF do.
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_USE_FOLDER = "use the model's Hugging Face folder, which has a tokenizer.json"
_DAMAGED = "the file is damaged: download it again"


def read_fields(fields: Mapping[str, Any], path: Path) -> TokenizerSource:
    """Raises CheckpointError or UnsupportedError, naming the field."""
    found = Fields({name.removeprefix("tokenizer."): value for name, value in fields.items()}, path)
    if found.get("ggml.tokens") is None or found.get("ggml.model") is None:
        raise CheckpointError("the GGUF holds no tokenizer", where=path, hint=_USE_FOLDER)
    vocabulary = _vocabulary(found)
    tokenizer = _byte_level_bpe(found, vocabulary)
    ids = {
        name: token_ids([found.get(f"ggml.{key}_token_id")], tokenizer, path) for name, key in _NAMED.items()
    }
    special = {name: vocabulary.tokens[found_ids[0]] for name, found_ids in ids.items() if found_ids}
    bos_id = next(iter(ids["bos_token"]), None)
    if found.flag("ggml.add_bos_token"):
        if bos_id is None:
            hint = "add the field tokenizer.ggml.bos_token_id"
            raise CheckpointError(
                "add_bos_token is true, but there is no bos_token_id", where=path, hint=hint
            )
        tokenizer.post_processor = _begin_with(special["bos_token"], bos_id)
    template = found.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise found.wrong("chat_template", "a text")
    ends = [found.get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return TokenizerSource(
        tokenizer=tokenizer,
        chat_template=template,
        bos_id=bos_id,
        eos_ids=token_ids(ends, tokenizer, path),
        special_tokens=special,
    )


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]


def _vocabulary(found: Fields) -> _Vocabulary:
    tokens, types = _list(found, "ggml.tokens", str), _list(found, "ggml.token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _list(found, "ggml.merges", str)]
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{len(tokens)} tokens, but {len(types)} token types", where=found.where, hint=_DAMAGED
        )
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError("a merge does not have two tokens", where=found.where, hint=_DAMAGED)
    return _Vocabulary(tokens=tokens, types=types, merges=merges)


def _list(found: Fields, name: str, kind: type) -> list[Any]:
    value = found.get(name)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise found.wrong(name, f"a list of {kind.__name__}")
    return value


def _byte_level_bpe(found: Fields, vocabulary: _Vocabulary) -> Tokenizer:
    kind, split = found.get("ggml.model"), found.get("ggml.pre")
    if kind != "gpt2" or not isinstance(split, str) or split not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"the tokenizer {kind!r} with the pre-tokenizer {split!r} is not supported",
            where=found.where,
            hint=_USE_FOLDER,
        )
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary.tokens)}, merges=vocabulary.merges
        )
    except Exception as error:  # the library raises Exception itself, for whatever is wrong
        raise CheckpointError(f"not a tokenizer: {error}", where=found.where, hint=_DAMAGED) from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[split]
    tokenizer.decoder = decoders.ByteLevel()
    by_type: dict[int, list[str]] = defaultdict(list)
    for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True):
        by_type[token_type].append(token)
    # Both are matched whole in the text; control tokens are left out of what is decoded for people.
    control, user_defined = by_type[gguf.TokenType.CONTROL], by_type[gguf.TokenType.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in user_defined])
    return tokenizer


def _begin_with(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
