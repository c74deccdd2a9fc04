"""The chat template and the tokenizer that an adapter's folder carries, as transformers would load them from there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bedplate.errors import AdapterError, CheckpointError, UnsupportedError
from bedplate.model.adapter.tensors import read_file
from bedplate.model.adapter.tokenizer import BaseTokenizer
from bedplate.model.adapter.types import AGAIN
from bedplate.model.folder_template import default_template
from bedplate.model.folder_tokenizer import read_folder
from bedplate.model.tokenizer_settings import SETTINGS, TokenizerSettings, read_settings
from bedplate.model.tokenizer_source import written

_TOKENIZER = "tokenizer.json"
# What transformers makes a tokenizer of where there is no tokenizer.json.
_VOCABULARIES = ("*.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken")


@dataclass(frozen=True, kw_only=True)
class AdapterText:
    """chat_template: Jinja source; None: the folder has none.

    special_tokens: `bos_token`, `eos_token` … as text; None: the folder has no tokenizer.
    tokenizer_json: of a tokenizer with further tokens; None: the bundle's gives the same ids for every text.
    """

    chat_template: str | None
    special_tokens: dict[str, str] | None
    tokenizer_json: bytes | None = None


def read_text(path: Path, base: BaseTokenizer, *, vocab: int) -> AdapterText:
    """Read what an adapter's folder says of text, and check it against the tokenizer of the bundle.

    A tokenizer is taken if it gives the same ids for every text, but for further tokens. vocab: how many tokens the
    adapter's model has. AdapterError: it does not, or a file is damaged.
    UnsupportedError: it cannot be compared, or no chat template is the default one.
    """
    if not path.is_dir():
        return AdapterText(chat_template=None, special_tokens=None)
    own = None
    try:
        settings = read_settings(path)
        template = default_template(path, settings.values.get("chat_template"))
        if (path / _TOKENIZER).is_file():
            own = _own_tokenizer(path, settings, base, vocab)
        else:
            _check_no_vocabulary(path)
    except CheckpointError as error:
        raise AdapterError(error.what, where=error.where, hint=AGAIN) from error
    if not (path / SETTINGS).is_file() and not (path / "special_tokens_map.json").is_file():
        return AdapterText(chat_template=template, special_tokens=None, tokenizer_json=own)
    if own is None:
        tokens = (*settings.named.values(), *settings.extra)
        base.check_tokens({token.content for token in tokens if token.content}, settings.added, path)
    return AdapterText(chat_template=template, special_tokens=settings.special_texts(), tokenizer_json=own)


def _own_tokenizer(path: Path, settings: TokenizerSettings, base: BaseTokenizer, vocab: int) -> bytes | None:
    """None: it is the bundle's. Raises AdapterError, CheckpointError, UnsupportedError."""
    file = path / _TOKENIZER
    named = {token.content for token in (*settings.named.values(), *settings.extra, *settings.added.values())}
    unknown = any(base.token_id(text) is None for text in named if text)
    if not base.further_tokens(file, read_file(file), vocab=vocab) and not unknown:
        return None
    # Its other files may add tokens too, or make some of them special.
    whole = written(read_folder(path).tokenizer)
    return whole if base.further_tokens(file, whole, vocab=vocab) else None


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
