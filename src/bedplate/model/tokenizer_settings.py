"""The JSON files beside a `tokenizer.json` → the tokens that transformers adds to it, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import shown
from bedplate.model.json_file import read_optional_object

T = TypeVar("T")
SETTINGS, OLDER = "tokenizer_config.json", "added_tokens.json"
SAVE = "save the tokenizer again: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
# In the order in which transformers adds those that the tokenizer does not have yet.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
_BY_NAME = "model_specific_special_tokens"
_LISTED = "added_tokens_decoder"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, kw_only=True)
class Token:
    """flags: how it is found in text, as far as the file says so."""

    content: str
    flags: Mapping[str, bool]

    @property
    def special(self) -> bool:
        return self.flags.get("special", False)

    @property
    def is_text(self) -> bool:
        """Whether the file has its text alone: it is then special, and nothing else."""
        return self.flags == {"special": True}

    def added(self, *, special: bool) -> AddedToken:
        return AddedToken(self.content, **{**self.flags, "special": special})


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """values: the fields of tokenizer_config.json, and of special_tokens_map.json where that file counts.

    named: special tokens by the names that a chat template may use. extra: special tokens without a name.
    added: tokens by id. listed: they come from tokenizer_config.json; if not, those of tokenizer.json come first.
    """

    values: Mapping[str, Any]
    named: Mapping[str, Token]
    extra: tuple[Token, ...]
    added: Mapping[int, Token]
    listed: bool

    def special_texts(self) -> dict[str, str]:
        """The text of each special token, by the name that a template may use: only an identifier is one."""
        return {name: token.content for name, token in self.named.items() if name.isidentifier()}


def read_settings(folder: Path) -> TokenizerSettings:
    """Read them as transformers does: special_tokens_map.json and added_tokens.json count only where
    tokenizer_config.json lists no added tokens. Raises CheckpointError or UnsupportedError, naming the file.
    """
    path = folder / SETTINGS
    values = read_optional_object(path)
    if values.get("fast_tokenizer_files"):
        raise UnsupportedError(
            "fast_tokenizer_files (a tokenizer for each version of transformers) is not supported",
            where=path,
            hint=SAVE,
        )
    if _EXTRA_BEFORE in values and not values.get(EXTRA):
        values[EXTRA] = values.pop(_EXTRA_BEFORE)
    by_name = {
        name: value
        for name, value in values.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str)
    }
    if isinstance(values.get(EXTRA), dict):
        by_name |= values.pop(EXTRA)
    if by_name:
        values[_BY_NAME] = by_name
    listed = _LISTED in values
    if not listed:
        _take_older(values, folder / "special_tokens_map.json")
    extra = values.get(EXTRA, values.get(_EXTRA_BEFORE)) or []
    if not isinstance(extra, list):
        raise wrong(EXTRA, "a list", extra, path)
    return TokenizerSettings(
        values=values,
        named=_named(values, path),
        extra=tuple(_token(token, EXTRA, path) for token in extra),
        added=_listed(values[_LISTED], path) if listed else _added_before(values, extra, folder),
        listed=listed,
    )


def _take_older(values: dict[str, Any], path: Path) -> None:
    """What special_tokens_map.json says comes before; its further tokens come beside those there are."""
    for name, value in read_optional_object(path).items():
        if isinstance(value, dict) and name != EXTRA:
            value = {**value, "__type": "AddedToken", "special": True}
        elif name == EXTRA and isinstance(value, list):
            before = values.get(EXTRA) or []
            if not isinstance(before, list):
                continue  # a wrong value, which the check of all values refuses
            value = [*before, *(token for token in value if token not in before)]
        values[name] = value
    if isinstance(values.get(EXTRA), dict):
        by_name = values.pop(EXTRA)
        values[_BY_NAME] = _object(values.get(_BY_NAME), _BY_NAME, path) | by_name


def _named(values: Mapping[str, Any], path: Path) -> dict[str, Token]:
    """The usual ones, then those of this model alone: `image_token`, and those that stand in a section by name."""
    found = {name: values[name] for name in _NAMED if values.get(name) is not None}
    for name, value in values.items():
        typed = isinstance(value, dict) and value.get("__type") == "AddedToken"
        if name.endswith("_token") and name not in _NAMED and (isinstance(value, str) or typed):
            found[name] = value
    found |= _object(values.get(_BY_NAME), _BY_NAME, path)
    return {name: _token(value, name, path) for name, value in in_order(found).items()}


def in_order(named: Mapping[str, T]) -> dict[str, T]:
    """The usual names first."""
    usual = {name: named[name] for name in _NAMED if name in named}
    return usual | dict(named)


def _listed(value: Any, path: Path) -> dict[int, Token]:
    listed = _object(value, _LISTED, path)
    return {_id(key, path): _token(token, f"added token {key}", path) for key, token in listed.items()}


def _added_before(values: Mapping[str, Any], extra: Iterable[Any], folder: Path) -> dict[int, Token]:
    """added_tokens.json of older versions: the id of each text."""
    path = folder / OLDER
    special = [values.get(name) for name in _NAMED] + list(extra)
    texts = {token["content"] if isinstance(token, dict) else token for token in special if token}
    found = {}
    for text, number in read_optional_object(path).items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise wrong(f"the id of {shown(text)}", "a number", number, path)
        found[number] = Token(content=text, flags={"normalized": text not in texts, "special": text in texts})
    return found


def _object(value: Any, name: str, path: Path) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise wrong(name, "an object", value, path)
    return value or {}


def _id(key: str, path: Path) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise wrong(f"an id in {_LISTED}", "a number", key, path)
    return int(key)


def _token(value: Any, name: str, path: Path) -> Token:
    """A token given by its text, or by an object that has its text and how it is matched."""
    if isinstance(value, str):
        value = {"content": value, "special": True}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise wrong(name, "a token", value, path)
    check_encodable(value["content"], name, path)
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    if bad := next((flag for flag in flags if type(flags[flag]) is not bool), None):
        raise wrong(f"{bad} of {name}", "true or false", flags[bad], path)
    return Token(content=value["content"], flags=flags)


def check_encodable(text: str, name: str, path: Path) -> None:
    """CheckpointError: there is half of a surrogate pair in it, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise wrong(name, "text that UTF-8 can write", text, path) from None


def wrong(name: str, wanted: str, value: Any, path: Path) -> CheckpointError:
    return CheckpointError(f"{name} must be {wanted}, got {shown(value)}", where=path, hint=SAVE)
