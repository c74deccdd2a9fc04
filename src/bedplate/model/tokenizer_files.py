"""The tokenizer that comes with a checkpoint: `tokenizer.json`, chat template, ids that begin and end text.

A Hugging Face folder carries them as files. A GGUF carries vocabulary and merges and *names* how text is
split before them; what a name stands for is the table `_PRE_TOKENIZERS`, and other names are refused.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.config import check_exists
from bedplate.model.gguf_file import open_gguf

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# What the table says is what the model's own tokenizer.json says, and llama.cpp does for the name.
_PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a bundle keeps of a tokenizer.

    tokenizer_json: what `tokenizers.Tokenizer.from_str` reads; equal tokenizers are equal bytes.
    chat_template: Jinja source; None: the model has none.
    bos_id: None: the model has none.  eos_ids: every id that ends an answer, in the checkpoint's order.
    special_tokens: of bos_token, eos_token, unk_token, pad_token those there are, as text.
    """

    tokenizer_json: bytes
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, str]


def read_tokenizer(model: Path, reader: gguf.GGUFReader | None = None) -> TokenizerFiles:
    """Read the tokenizer of a Hugging Face folder or a `.gguf` file; `reader` is of that file, if it is open already.

    NotFoundError: no such path.  CheckpointError: files are missing or contradict each other.
    UnsupportedError: a kind of tokenizer that bedplate cannot rebuild.
    """
    check_exists(model)
    if model.is_dir():
        return _read_folder(model)
    return _read_gguf(reader or open_gguf(model), model)


def _read_folder(folder: Path) -> TokenizerFiles:
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "download it with the model; to make one: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        raise CheckpointError("the model has no tokenizer.json", where=folder, hint=hint)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself, for whatever is wrong
        raise CheckpointError(f"not a tokenizer: {error}", where=path, hint="download it again") from None
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    _check_added(tokenizer, settings, folder)
    special = _special_tokens(settings)
    configs = [_json(folder / "generation_config.json"), _json(folder / "config.json")]
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    bos_ids = _ids([*(config.get("bos_token_id") for config in configs), ids.get("bos_token")])
    return _files(
        folder,
        tokenizer,
        chat_template=_chat_template(folder, settings.get("chat_template")),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=_ids([*(config.get("eos_token_id") for config in configs), ids.get("eos_token")]),
        special_tokens=special,
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=path, hint="download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", where=path, hint="download it again")
    return value


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    """The ids in a list of ids, lists of ids, and None; each once, in order."""
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(item for item in flat if item is not None))


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {name: settings[name] for name in _SPECIAL if settings.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def _check_added(tokenizer: Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    for number, token in settings.get("added_tokens_decoder", {}).items():
        if tokenizer.token_to_id(token["content"]) != int(number):
            raise CheckpointError(
                f"tokenizer_config.json gives {token['content']!r} the id {number}, tokenizer.json does not",
                where=folder,
                hint="save the tokenizer again: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )


def _chat_template(folder: Path, setting: Any) -> str | None:
    """From its own file or tokenizer_config.json, which holds one template, or a list of them by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    if not isinstance(setting, list):
        return None if setting is None else str(setting)
    named = {entry["name"]: str(entry["template"]) for entry in setting}
    if "default" not in named:
        known = ", ".join(sorted(named))
        raise UnsupportedError(f"no chat template is the default one, only {known}", where=folder)
    return named["default"]


def _read_gguf(reader: gguf.GGUFReader, path: Path) -> TokenizerFiles:
    def field(name: str) -> Any:
        entry = reader.fields.get(f"tokenizer.{name}")
        return None if entry is None else entry.contents()

    if field("ggml.tokens") is None or field("ggml.model") is None:
        raise CheckpointError("the GGUF holds no tokenizer", where=path)
    tokenizer = _byte_level_bpe(field, path)
    special = {
        name: field("ggml.tokens")[field(f"ggml.{key}_token_id")]
        for name, key in zip(_SPECIAL, ("bos", "eos", "unknown", "padding"), strict=True)
        if field(f"ggml.{key}_token_id") is not None
    }
    if field("ggml.add_bos_token"):
        tokenizer.post_processor = _begin_with(special["bos_token"], field("ggml.bos_token_id"))
    return _files(
        path,
        tokenizer,
        chat_template=field("chat_template"),
        bos_id=field("ggml.bos_token_id"),
        eos_ids=_ids(field(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")),
        special_tokens=special,
    )


def _byte_level_bpe(field: Callable[[str], Any], path: Path) -> Tokenizer:
    kind, split = field("ggml.model"), field("ggml.pre")
    if kind != "gpt2" or split not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"the tokenizer {kind!r} with the pre-tokenizer {split!r} is not supported",
            where=path,
            hint="use the model's Hugging Face folder, which has a tokenizer.json",
        )
    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[split]
    tokenizer.decoder = decoders.ByteLevel()
    by_type: dict[int, list[str]] = defaultdict(list)
    for token, token_type in zip(tokens, field("ggml.token_type"), strict=True):
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


def _files(
    where: Path,
    tokenizer: Tokenizer,
    *,
    chat_template: str | None,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    special_tokens: dict[str, str],
) -> TokenizerFiles:
    for number in (*eos_ids, *(() if bos_id is None else (bos_id,))):
        if type(number) is not int or tokenizer.id_to_token(number) is None:
            hint = "check bos_token_id and eos_token_id in its configs"
            raise CheckpointError(f"the tokenizer has no token {number!r}", where=where, hint=hint)
    # Some checkpoints carry the truncation and padding of their training run, which would cut prompts in
    # silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TokenizerFiles(
        tokenizer_json=_written(tokenizer).encode(),
        chat_template=chat_template,
        bos_id=bos_id,
        eos_ids=eos_ids,
        special_tokens=special_tokens,
    )


def _written(tokenizer: Tokenizer) -> str:
    """Its JSON, each merge one string where that is clear: older readers want it so, and newer ones read it sooner."""
    written = str(tokenizer.to_str())
    data = json.loads(written)
    merges = data["model"].get("merges")
    if not merges or any(" " in part for merge in merges for part in merge):
        return written
    data["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
