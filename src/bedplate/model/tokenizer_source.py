"""A tokenizer as a checkpoint gives it, before it becomes the files of a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bedplate.errors import CheckpointError
from bedplate.model.fields import shown


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """The fields are those of `TokenizerFiles`, but `tokenizer`, which is not written yet."""

    tokenizer: Tokenizer
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, str]


def token_ids(values: Iterable[Any], tokenizer: Tokenizer, where: Path) -> tuple[int, ...]:
    """The ids in a list of ids, lists of ids, and None; each once, in order.

    CheckpointError: one is no integer, or the tokenizer has no token of it.
    """
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    for number in flat:
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < 2**31 or tokenizer.id_to_token(number) is None:
            raise CheckpointError(
                f"the tokenizer has no token {shown(number)}",
                where=where,
                hint="check bos_token_id and eos_token_id in generation_config.json and config.json",
            )
    return tuple(dict.fromkeys(item for item in flat if item is not None))


def written(tokenizer: Tokenizer) -> bytes:
    """Its `tokenizer.json`, without truncation and padding. Equal tokenizers are equal bytes.

    Some checkpoints carry the truncation and padding of their training run, which would cut prompts in silence.
    Each merge is one string where that is clear: older readers want it so, and newer ones read it sooner.
    A vocabulary is in the order of its tokens, which is read sooner than the order of their ids.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    data = json.loads(tokenizer.to_str())
    merges, vocabulary = data["model"].get("merges"), data["model"].get("vocab")
    if merges and not any(" " in part for merge in merges for part in merge):
        data["model"]["merges"] = [" ".join(merge) for merge in merges]
    if isinstance(vocabulary, dict):
        data["model"]["vocab"] = {token: vocabulary[token] for token in sorted(vocabulary)}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
