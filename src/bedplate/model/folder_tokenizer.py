"""The tokenizer of a Hugging Face folder, put together from its files as transformers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import shown
from bedplate.model.json_file import read_optional_object, read_text
from bedplate.model.tokenizer_source import SPECIAL, TokenizerSource, token_ids

# In the order in which transformers adds those that the tokenizer does not have yet.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SAVE = "save the tokenizer again: AutoTokenizer.from_pretrained(…).save_pretrained(…)"


def read_folder(folder: Path) -> TokenizerSource:
    """Raises CheckpointError or UnsupportedError, naming the file."""
    tokenizer = _tokenizer(folder / "tokenizer.json")
    settings = _settings(folder)
    path = folder / "tokenizer_config.json"
    if settings.get("split_special_tokens"):
        raise UnsupportedError(
            "split_special_tokens is not supported: special tokens are matched whole",
            where=path,
            hint="remove the field",
        )
    named = {name: _token(settings[name], name, path) for name in _named(settings)}
    _add_tokens(tokenizer, settings, [token for token in named.values() if token.content], path)
    special = {name: named[name].content for name in SPECIAL if name in named}
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    configs = [read_optional_object(folder / f"{name}.json") for name in ("generation_config", "config")]
    bos_ids = token_ids([_first(configs, "bos_token_id"), ids.get("bos_token")], tokenizer, folder)
    return TokenizerSource(
        tokenizer=tokenizer,
        chat_template=_chat_template(folder, settings.get("chat_template")),
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
        raise CheckpointError(f"not a tokenizer: {error}", where=path, hint="download it again") from None


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; of older versions, which name no added tokens there, special_tokens_map.json wins."""
    settings = read_optional_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return settings | read_optional_object(folder / "special_tokens_map.json")


def _first(configs: list[dict[str, Any]], field: str) -> Any:
    """Where generation_config.json says which token ends an answer, config.json does not count."""
    return next((config[field] for config in configs if config.get(field) is not None), None)


def _named(settings: dict[str, Any]) -> list[str]:
    """The fields that name a special token: the usual ones, then those of this model alone (`image_token`)."""
    own = [
        name
        for name, value in settings.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str)
    ]
    return [name for name in (*_NAMED, *own) if settings.get(name) is not None]


def _add_tokens(tokenizer: Tokenizer, settings: dict[str, Any], named: list[AddedToken], path: Path) -> None:
    """Add what the settings name and the tokenizer does not have. CheckpointError: their ids are other ones."""
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise _not("added_tokens_decoder", "an object", listed, path)
    by_id = {_id(key, path): _token(token, f"added token {key}", path) for key, token in listed.items()}
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for _, token in sorted(by_id.items()) if repr(token) not in known])
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise _not("extra_special_tokens", "a list", extra, path)
    values = extra.values() if isinstance(extra, dict) else extra
    for token in (*named, *(_token(value, "extra_special_tokens", path) for value in values)):
        if token.content not in {added.content for added in tokenizer.get_added_tokens_decoder().values()}:
            tokenizer.add_tokens([token])
    for number, token in by_id.items():
        if tokenizer.token_to_id(token.content) != number:
            raise CheckpointError(
                f"gives {token.content!r} the id {number}, but tokenizer.json does not",
                where=path,
                hint=_SAVE,
            )


def _id(key: str, path: Path) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise _not("an id in added_tokens_decoder", "a number", key, path)
    return int(key)


def _token(value: Any, name: str, path: Path) -> AddedToken:
    """A token given by its text, or by an object that has its text and how it is matched."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise _not(name, "a token", value, path)
    flags = {flag: value[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized") if flag in value}
    flags["special"] = value.get("special", name in _NAMED)
    if wrong := next((flag for flag in flags if type(flags[flag]) is not bool), None):
        raise _not(f"{wrong} of {name}", "true or false", flags[wrong], path)
    return AddedToken(value["content"], **flags)


def _chat_template(folder: Path, setting: Any) -> str | None:
    """The default one. Templates in files of their own win over all those in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (single := folder / "chat_template.jinja").is_file():
        files.setdefault("default", single)
    if files:
        return read_text(files["default"]) if "default" in files else _no_default(files, folder)
    if isinstance(setting, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in setting):
            raise _not("chat_template", "a text, or a list of templates with their names", setting, path)
        setting = {str(entry["name"]): entry["template"] for entry in setting}
    if isinstance(setting, dict):
        setting = setting["default"] if "default" in setting else _no_default(setting, path)
    if setting is not None and not isinstance(setting, str):
        raise _not("chat_template", "a text, or a list of templates with their names", setting, path)
    return setting


def _no_default(named: dict[str, Any], where: Path) -> str:
    raise UnsupportedError(
        f"no chat template is the default one; there is: {', '.join(sorted(named)) or 'none'}",
        where=where,
        hint="write the template to use into chat_template.jinja",
    )


def _not(name: str, wanted: str, value: Any, path: Path) -> CheckpointError:
    return CheckpointError(f"{name} must be {wanted}, got {shown(value)}", where=path, hint=_SAVE)
