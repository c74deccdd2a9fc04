"""Whether an adapter's tokenizer gives the same ids for every text as the bundle's, or has further tokens beside."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bedplate.errors import AdapterError
from bedplate.model.adapter.types import AGAIN
from bedplate.model.tokenizer_settings import Token

_OTHER_IDS = "the adapter was trained on other ids than the bundle's: build a bundle from its own base model"
_SAME = (
    "if the adapter was trained with the base model's tokenizer, remove the tokenizer's files from its folder"
)
_PARTS = {
    "normalizer": "changes text before it cuts it",
    "pre_tokenizer": "cuts text into words",
    "model": "cuts words into tokens",
    "post_processor": "puts tokens before and after a text",
    "decoder": "makes text of tokens",
}


class BaseTokenizer:
    """The `tokenizer.json` of a bundle, which is read when an adapter has something to compare with it."""

    def __init__(self, file: Path, special_tokens: Mapping[str, str]) -> None:
        self._file, self._special_tokens = file, special_tokens

    @cached_property
    def _parts(self) -> dict[str, Any]:
        return _canonical(self._file.read_text("utf-8"))

    def token_id(self, text: str) -> int | None:
        """None: it is not one token."""
        found: int | None = self._parts["vocab"].get(text)
        return found

    def further_tokens(self, file: Path, data: bytes, *, vocab: int) -> bool:
        """Whether another `tokenizer.json` has tokens that the bundle's has not. In all else it must be the same.

        data: its content, with the tokens that other files add to it. vocab: how many tokens the adapter's model has.
        AdapterError: it differs in more than what no id depends on, a token has no row, or the file is damaged.
        """
        if data == self._file.read_bytes():
            return False
        try:
            ours = _canonical(data.decode())
        except Exception as error:  # tokenizers raises nothing narrower
            raise AdapterError(f"not a tokenizer: {error}", where=file, hint=AGAIN) from None
        further = _further_tokens(ours, self._parts, vocab, file)
        for part, does in _PARTS.items():
            if ours[part] != self._parts[part]:
                raise AdapterError(
                    f"its tokenizer {does} in another way than the bundle's: {part} is {_short(ours[part])}, "
                    f"the bundle's is {_short(self._parts[part])}",
                    where=file,
                    hint=_SAME,
                )
        added = self._parts["added"]
        for text in sorted((ours["added"].keys() | added.keys()) - further):
            if ours["added"].get(text) != added.get(text):
                raise _looked_for(text, file)
        return bool(further)

    def check_tokens(self, special: Collection[str], added: Mapping[int, Token], folder: Path) -> None:
        """AdapterError: a token is not the bundle's, or is looked for in text in another way.

        special: texts that are one token each wherever they stand.
        added: by id.
        """
        for text in sorted(set(special) - set(self._special_tokens.values())):
            if text not in self._parts["vocab"]:
                raise _further(text, folder)
            if text not in self._parts["added"]:
                what = f"its tokenizer takes {text!r} for one token wherever it stands; the bundle's does not"
                raise AdapterError(what, where=folder, hint=_SAME)
        for number, token in sorted(added.items()):
            text = token.content
            if text not in self._parts["vocab"]:
                raise _further(text, folder)
            _check_id(text, number, self._parts["vocab"][text], folder)
            own = self._parts["added"].get(text)
            if own is None or any(token.flags[name] != own[name] for name in token.flags.keys() & own.keys()):
                raise _looked_for(text, folder)


def _further(text: str, where: Path) -> AdapterError:
    return AdapterError(
        f"its tokenizer has the token {text!r}, which the bundle's does not have",
        where=where,
        hint="a new token needs a row in the embedding (resize_token_embeddings, save_embedding_layers=True) and a "
        "tokenizer.json beside the adapter; " + _SAME,
    )


def _looked_for(text: str, where: Path) -> AdapterError:
    what = f"its tokenizer looks for {text!r} in text in another way than the bundle's"
    return AdapterError(what, where=where, hint=_SAME)


def _further_tokens(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], vocab: int, file: Path
) -> frozenset[str]:
    """The tokens that only ours has, which the model has rows for. All others are the same."""
    if missing := sorted(theirs["vocab"].keys() - ours["vocab"].keys(), key=theirs["vocab"].__getitem__):
        what = f"its tokenizer lacks {len(missing)} tokens of the bundle's, {missing[0]!r} among them"
        raise AdapterError(what, where=file, hint=_OTHER_IDS)
    further = ours["vocab"].keys() - theirs["vocab"].keys()
    for text, number in sorted(ours["vocab"].items(), key=lambda token: (token[1], token[0])):
        if text in further:
            if number >= vocab or text not in ours["added"]:
                raise _further(text, file)
        else:
            _check_id(text, number, theirs["vocab"][text], file)
    return frozenset(further)


def _check_id(text: str, number: int, own: int, where: Path) -> None:
    if number != own:
        what = f"its tokenizer gives {text!r} the id {number}, the bundle's gives it {own}"
        raise AdapterError(what, where=where, hint=_OTHER_IDS)


def _canonical(text: str) -> dict[str, Any]:
    """What ids depend on, in one form, whichever version wrote it: the parts of _PARTS, `vocab` and `added`."""
    tokenizer = Tokenizer.from_str(text)
    data = json.loads(tokenizer.to_str())
    normalizer = _plain(data["normalizer"], "normalizers")
    added = {token.pop("content"): token for token in data["added_tokens"]}
    if normalizer is None:
        for token in added.values():
            del token["normalized"]
    model = {
        name: None if value in ("", [], 0.0) and name != "unk_id" else value
        for name, value in data["model"].items()
        if name != "vocab" or isinstance(value, list)  # a list holds scores too
    }
    if model.get("unk_token") is None:
        model["fuse_unk"] = None
    return {
        "vocab": tokenizer.get_vocab(with_added_tokens=True),
        "added": added,
        "normalizer": normalizer,
        "pre_tokenizer": _plain(data["pre_tokenizer"], "pretokenizers"),
        "model": model,
        "post_processor": _post_processor(data["post_processor"]),
        "decoder": _plain(data["decoder"], "decoders"),
    }


def _plain(part: Any, listed: str) -> Any:
    """A part without what moves only offsets, and without sequences of one."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        inner = [_plain(one, listed) for one in part[listed]]
        return inner[0] if len(inner) == 1 else inner or None
    if part["type"] == "ByteLevel":
        # To decode, it needs none of its settings.
        kept = () if listed == "decoders" else ("add_prefix_space", "use_regex")
        return {"type": "ByteLevel", **{name: part[name] for name in kept if name in part}}
    return part


def _post_processor(part: Any) -> Any:
    """What it puts around one text: None, a list of ids with "text" among them, or the processor as it is."""
    parts = part["processors"] if part is not None and part["type"] == "Sequence" else [part]
    parts = [one for one in parts if one is not None and one["type"] != "ByteLevel"]  # moves offsets only
    if len(parts) != 1 or parts[0]["type"] != "TemplateProcessing":
        return parts or None
    tokens = parts[0]["special_tokens"]
    around = [
        "text" if "Sequence" in piece else tokens[piece["SpecialToken"]["id"]]["ids"]
        for piece in parts[0]["single"]
    ]
    return None if around == ["text"] else around


def _short(part: Any) -> str:
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) <= 100 else text[:99] + "…"
