"""The tokenizer that comes with a checkpoint: `tokenizer.json`, chat template, ids that begin and end text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bedplate.errors import CheckpointError
from bedplate.model.config import check_exists
from bedplate.model.folder_tokenizer import read_folder
from bedplate.model.gguf_file import gguf_fields, open_gguf
from bedplate.model.gguf_tokenizer import read_fields
from bedplate.model.tokenizer_source import written


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a bundle keeps of a tokenizer.

    tokenizer_json: what `tokenizers.Tokenizer.from_str` reads; equal tokenizers are equal bytes.
    chat_template: Jinja source; None: the model has none.
    bos_id: None: the model has none.  eos_ids: every id that ends an answer, in the checkpoint's order.
    special_tokens: every special token that has a name (`bos_token` …), as text.
    last_token, last_id: the token of the highest id.
    """

    tokenizer_json: bytes
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    last_token: str
    last_id: int


def read_tokenizer(model: Path, fields: Mapping[str, Any] | None = None) -> TokenizerFiles:
    """Read the tokenizer of a Hugging Face folder or a `.gguf` file.

    fields: those of the GGUF, if they are read already.
    NotFoundError: no such path.  CheckpointError: files are missing or contradict each other.
    UnsupportedError: a kind of tokenizer that bedplate cannot rebuild.
    """
    check_exists(model)
    if model.is_dir():
        source = read_folder(model)
    else:
        source = read_fields(fields or gguf_fields(open_gguf(model), model), model)
    tokenizer = source.tokenizer
    written_json = written(tokenizer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise CheckpointError("the tokenizer has no tokens", where=model, hint="download it again")
    last = max(vocabulary, key=vocabulary.__getitem__)
    return TokenizerFiles(
        tokenizer_json=written_json,
        chat_template=source.chat_template,
        bos_id=source.bos_id,
        eos_ids=source.eos_ids,
        special_tokens=source.special_tokens,
        last_token=last,
        last_id=vocabulary[last],
    )


def check_ids(tokenizer: TokenizerFiles, vocab_size: int, *, where: Path) -> None:
    """CheckpointError: the tokenizer has an id for which the model has no row in its embedding."""
    if tokenizer.last_id >= vocab_size:
        raise CheckpointError(
            f"the tokenizer has ids up to {tokenizer.last_id} ({tokenizer.last_token!r}), but the embedding of the "
            f"model has {vocab_size} rows",
            where=where,
            hint="remove these tokens from the tokenizer's files, or add rows to the model: "
            "model.resize_token_embeddings(len(tokenizer))",
        )
