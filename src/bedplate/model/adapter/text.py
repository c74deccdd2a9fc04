"""The chat template and the tokenizer that an adapter's folder carries, as transformers would load them from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.tensors import read_file
from bedplate.model.adapter.tokenizer import BaseTokenizer
from bedplate.model.adapter.types import AGAIN

TEMPLATE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_MORE_TEMPLATES = "additional_chat_templates"
_TOKENIZER = "tokenizer.json"
# What transformers makes a tokenizer of where there is no tokenizer.json.
_VOCABULARIES = ("*.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken")


@dataclass(frozen=True, kw_only=True)
class AdapterText:
    """chat_template: Jinja source; None: the folder has none.

    special_tokens: `bos_token`, `eos_token` … as text; None: the folder has no tokenizer.
    """

    chat_template: str | None
    special_tokens: dict[str, str] | None


def read_text(path: Path, base: BaseTokenizer) -> AdapterText:
    """Read what an adapter's folder says of text, and check it against the tokenizer of the bundle.

    A tokenizer is taken if it gives the same ids for every text. AdapterError: it does not, or a file is damaged.
    UnsupportedError: it cannot be compared, or no chat template is the default one.
    """
    if not path.is_dir():
        return AdapterText(chat_template=None, special_tokens=None)
    settings = _settings(path)
    if (path / _TOKENIZER).is_file():
        base.check_same(path / _TOKENIZER)
    else:
        _check_no_vocabulary(path)
    template = _chat_template(path, settings.get("chat_template"))
    if not (path / SETTINGS).is_file() and not (path / "special_tokens_map.json").is_file():
        return AdapterText(chat_template=template, special_tokens=None)
    special_tokens = _special_tokens(settings, path)
    texts = {*special_tokens.values(), *_unnamed_tokens(settings, path)}
    base.check_tokens(texts, _added_tokens(settings, path), path)
    return AdapterText(chat_template=template, special_tokens=special_tokens)


def _settings(folder: Path) -> dict[str, Any]:
    """What a tokenizer is made with. Where the tokens have numbers in its config, no other file is asked for them."""
    settings = _read_json(folder / SETTINGS)
    if settings.get("fast_tokenizer_files"):
        what = "fast_tokenizer_files (a tokenizer for each version of transformers) is not supported"
        raise UnsupportedError(
            what,
            where=folder / SETTINGS,
            hint="save the tokenizer again with a current version of transformers",
        )
    if "added_tokens_decoder" in settings:
        return settings
    added = {str(number): text for text, number in _read_json(folder / "added_tokens.json").items()}
    return settings | _read_json(folder / "special_tokens_map.json") | {"added_tokens_decoder": added}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"is not JSON: {error}", where=path, hint=AGAIN) from None
    if not isinstance(value, dict):
        raise AdapterError("is not a JSON object", where=path, hint=AGAIN)
    return value


def _check_no_vocabulary(folder: Path) -> None:
    found = [file for pattern in _VOCABULARIES for file in sorted(folder.glob(pattern))]
    if found:
        raise UnsupportedError(
            "the adapter has a tokenizer of its own that cannot be compared with the bundle's: "
            f"there is no {_TOKENIZER}",
            where=found[0],
            hint="if it is the base model's, remove it from the folder; otherwise save it with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )


def _chat_template(folder: Path, setting: Any) -> str | None:
    """Files come before the setting, which is one template or a list of them by name."""
    named = {file.stem: _read_template(file) for file in sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        return _read_template(folder / TEMPLATE)
    if not named:
        if setting is None:
            return None
        try:
            listed = [{"name": "default", "template": setting}] if isinstance(setting, str) else setting
            named = {str(entry["name"]): _encodable(entry["template"]) for entry in listed}
        except (TypeError, KeyError, UnicodeError, AttributeError):
            what = f"chat_template is {setting!r:.60}, neither a text nor a list of named texts"
            raise AdapterError(what, where=folder / SETTINGS, hint=AGAIN) from None
    if "default" not in named:
        known = ", ".join(sorted(named)) or "none"
        hint = f"write the template to use into {TEMPLATE}"
        raise UnsupportedError(
            f"no chat template is the default one; there is: {known}", where=folder, hint=hint
        )
    return named["default"]


def _encodable(text: str) -> str:
    text.encode()
    return text


def _read_template(file: Path) -> str:
    try:
        # As transformers reads it: line ends become \n.
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot be read: {error}", where=file, hint=AGAIN) from None


def _special_tokens(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """What the template sees by name: every setting `…_token` that is a text, and named further ones."""
    found = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    for named in (settings.get("model_specific_special_tokens"), _extra_tokens(settings)):
        found |= named if isinstance(named, dict) else {}
    # A template can only name what is an identifier.
    return {name: _text(value, folder) for name, value in sorted(found.items()) if name.isidentifier()}


def _unnamed_tokens(settings: Mapping[str, Any], folder: Path) -> list[str]:
    extra = _extra_tokens(settings)
    return [_text(token, folder) for token in extra] if isinstance(extra, list) else []


def _extra_tokens(settings: Mapping[str, Any]) -> Any:
    return settings.get("extra_special_tokens") or settings.get("additional_special_tokens")


def _added_tokens(settings: Mapping[str, Any], folder: Path) -> dict[int, dict[str, Any]]:
    """By id: `content`, and how it is found in text (`lstrip` …) as far as the settings say so."""
    added: Any = settings["added_tokens_decoder"]
    try:
        return {
            int(number): dict(token) if isinstance(token, dict) else {"content": token}
            for number, token in added.items()
        }
    except (AttributeError, ValueError):
        raise AdapterError(
            "added_tokens_decoder is not a table of tokens by their ids", where=folder / SETTINGS, hint=AGAIN
        ) from None


def _text(token: Any, folder: Path) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise AdapterError(f"{token!r:.60} is not a token", where=folder / SETTINGS, hint=AGAIN)
    return text
