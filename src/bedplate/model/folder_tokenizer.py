"""The tokenizer of a Hugging Face folder, put together from its files as transformers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.folder_template import default_template
from bedplate.model.json_file import damaged, read_optional_object
from bedplate.model.pieces import add_ends
from bedplate.model.sentencepiece_file import FILE
from bedplate.model.sentencepiece_tokenizer import sentencepiece_tokenizer
from bedplate.model.tokenizer_settings import OLDER, SAVE, SETTINGS, TokenizerSettings, read_settings
from bedplate.model.tokenizer_source import TokenizerSource, token_ids

_ENDS = ("bos_token", "eos_token")


def read_folder(folder: Path) -> TokenizerSource:
    """Raises CheckpointError or UnsupportedError, naming the file."""
    settings = read_settings(folder)
    path, pieces = folder / SETTINGS, folder / FILE
    configs = [read_optional_object(folder / f"{name}.json") for name in ("generation_config", "config")]
    of_pieces = pieces.is_file() and not (folder / "tokenizer.json").is_file()
    if of_pieces:
        tokenizer, settings = sentencepiece_tokenizer(pieces, settings, configs[1])
    else:
        tokenizer = _tokenizer(folder / "tokenizer.json")
    if settings.values.get("split_special_tokens"):
        raise UnsupportedError(
            "split_special_tokens is not supported: special tokens are matched whole",
            where=path,
            hint="remove the field",
        )
    _add_tokens(tokenizer, settings, path)
    special = settings.special_texts()
    if of_pieces:  # a tokenizer.json says itself what stands before a text
        before, behind = (special.get(name) if settings.values.get(f"add_{name}") else None for name in _ENDS)
        add_ends(tokenizer, before or None, behind or None)
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    bos_ids = token_ids([_first(configs, "bos_token_id"), ids.get("bos_token")], tokenizer, folder)
    return TokenizerSource(
        tokenizer=tokenizer,
        chat_template=default_template(folder, settings.values.get("chat_template")),
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=token_ids([_first(configs, "eos_token_id"), ids.get("eos_token")], tokenizer, folder),
        special_tokens=special,
    )


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        hint = "download it with the model; to make one: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        raise CheckpointError("the model has no tokenizer.json", where=path.parent, hint=hint)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself, for whatever is wrong
        raise CheckpointError(
            f"not a tokenizer: {error}", where=path, hint=damaged(path, "download it again")
        ) from None


def _first(configs: list[dict[str, Any]], field: str) -> Any:
    """Where generation_config.json says which token ends an answer, config.json does not count."""
    return next((config[field] for config in configs if config.get(field) is not None), None)


def _add_tokens(tokenizer: Tokenizer, settings: TokenizerSettings, path: Path) -> None:
    """Add what the settings name and the tokenizer does not have. CheckpointError: their ids are other ones."""
    before = tokenizer.get_added_tokens_decoder()
    added = {
        number: token for number, token in settings.added.items() if settings.listed or number not in before
    }
    names = {token.content for token in settings.named.values()}
    known = {repr(token) for token in before.values()}
    new = [
        token for _, token in sorted(added.items()) if repr(token.added(special=token.special)) not in known
    ]
    there = {token.content for token in before.values()} | {token.content for token in new}
    seen = set[tuple[str, bool]]()
    for token in (*settings.named.values(), *settings.extra):
        # As in transformers, a text and an object are never the same token: the later one says how it is found.
        form = (token.content, token.is_text)
        if token.content and token.content not in there and form not in seen:
            seen.add(form)
            new.append(token)
    # What has a name is special, whatever else is said of it.
    tokenizer.add_tokens([token.added(special=token.special or token.content in names) for token in new])
    for number, token in added.items():
        if tokenizer.token_to_id(token.content) != number:
            raise CheckpointError(
                f"gives {token.content!r} the id {number}, the tokenizer does not",
                where=path if settings.listed else path.with_name(OLDER),
                hint=SAVE,
            )
