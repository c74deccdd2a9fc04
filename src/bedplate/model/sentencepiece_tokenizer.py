"""A folder with a `tokenizer.model` and no `tokenizer.json` → the tokenizer that transformers 5.24 makes of it.

transformers does so in three ways, and which one follows from the class that AutoTokenizer chooses. LlamaTokenizer and
GemmaTokenizer take the pieces, and merge by ids. TokenizersBackend follows the settings of the sentencepiece model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.pieces import SPACE, Kind
from bedplate.model.sentencepiece_file import BPE, DAMAGED, UNIGRAM, SentencePiece, read_sentencepiece
from bedplate.model.tokenizer_settings import EXTRA, SETTINGS, Token, TokenizerSettings, in_order, wrong

_CONVERT = "make a tokenizer.json: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
LLAMA, GEMMA, BACKEND = "LlamaTokenizer", "GemmaTokenizer", "TokenizersBackend"
# The class that AutoTokenizer has for a model_type. It counts more than what a folder says where it is the backend.
REGISTERED = {
    **dict.fromkeys(("ernie4_5", "glm4", "granite", "granitemoehybrid", "ministral", "ministral3"), BACKEND),
    **dict.fromkeys(("mistral", "nemotron", "olmo2", "olmo3", "phi3", "stablelm"), BACKEND),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), GEMMA),
    "cohere2": "CohereTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
# A folder of these that says another class is wrong.
MISLABELED = ("qwen2",)
# The special tokens that a class has by default.
_USUAL = {
    LLAMA: {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    GEMMA: {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}


def sentencepiece_tokenizer(
    path: Path, settings: TokenizerSettings, config: Mapping[str, Any]
) -> tuple[Tokenizer, TokenizerSettings]:
    """The tokenizer, and the settings with the tokens that the sentencepiece model and the class add.

    config: of the model (config.json). Raises CheckpointError or UnsupportedError.
    """
    kind = _class(path, settings.values, config)
    if kind not in (*_USUAL, BACKEND):
        raise UnsupportedError(
            f"tokenizer_class = {kind!r} is not supported without a tokenizer.json", where=path, hint=_CONVERT
        )
    read = read_sentencepiece(path)
    if read.kind not in (UNIGRAM, BPE):
        raise UnsupportedError(
            "this sentencepiece model is not supported: it is of words or characters",
            where=path,
            hint=_CONVERT,
        )
    usual = read.named if kind == BACKEND else _USUAL[kind]
    settings = _with_tokens(settings, usual, read, backend=kind == BACKEND)
    legacy = _flag(settings.values, "legacy", kind == BACKEND, path)
    prefix = _flag(settings.values, "add_prefix_space", True, path, null=True)
    try:
        if kind == BACKEND:
            return _backend(read, settings.added, legacy=legacy), settings
        if kind == GEMMA:
            return _gemma(read, settings.named), settings
        return _llama(read, prefix=prefix, legacy=legacy), settings
    except Exception as error:  # the library raises Exception itself, for whatever is wrong
        raise CheckpointError(f"not a tokenizer: {error}", where=path, hint=DAMAGED) from None


def _class(path: Path, values: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """As AutoTokenizer chooses it."""
    if values.get("auto_map"):
        raise UnsupportedError(
            "auto_map (a tokenizer with code of its own) is not supported", where=path, hint=_CONVERT
        )
    for other in ("tekken.json", "tiktoken.model"):
        if (path.parent / other).exists():
            raise UnsupportedError(
                f"{other} beside tokenizer.model is not supported", where=path.parent, hint=_CONVERT
            )
    said = values.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if not isinstance(said, str):
        raise wrong("tokenizer_class", "text", said, path.with_name(SETTINGS))
    said = BACKEND if said == "PreTrainedTokenizerFast" else said.removesuffix("Fast")
    model_type = config.get("model_type")
    registered = REGISTERED.get(model_type, "") if isinstance(model_type, str) else ""
    if registered == BACKEND or not said or model_type in MISLABELED:
        return registered or BACKEND
    return said


def _flag(values: Mapping[str, Any], name: str, default: bool, path: Path, *, null: bool = False) -> bool:
    """null: what null means."""
    value = values.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, "true or false", value, path.with_name(SETTINGS))
    return null if value is None else value


def _with_tokens(
    settings: TokenizerSettings, usual: Mapping[str, str], read: SentencePiece, *, backend: bool
) -> TokenizerSettings:
    """With the special tokens by name that a class has where the settings say nothing, and tokens of the model."""
    text = {"special": True}
    named = {
        name: Token(content=content, flags=text)
        for name, content in usual.items()
        if name not in settings.values
    }
    extra, added = settings.extra, settings.added
    if EXTRA not in settings.values:
        kinds = (Kind.CONTROL,) if backend else (Kind.CONTROL, Kind.USER_DEFINED)
        extra = tuple(
            Token(content=piece.text, flags={"normalized": False, "special": piece.kind == Kind.CONTROL})
            for piece in read.pieces
            if piece.kind in kinds
        )
    if backend and read.prefix:  # so that text behind them begins with a space, too
        added = {
            number: replace(token, flags={**token.flags, "normalized": False})
            for number, token in added.items()
        }
    return replace(settings, named=in_order(named | dict(settings.named)), extra=extra, added=added)


def _by_ids(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs that are merged, the best first: by the ids of what they make, and then the shortest beginning."""
    return [
        (text[:length], text[length:])
        for text in vocabulary
        for length in range(1, len(text))
        if text[:length] in vocabulary and text[length:] in vocabulary
    ]


def _llama(read: SentencePiece, *, prefix: bool, legacy: bool) -> Tokenizer:
    vocabulary = {piece.text: number for number, piece in enumerate(read.pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_by_ids(vocabulary), fuse_unk=True, byte_fallback=True)
    )
    scheme = "never" if not prefix else "always" if legacy else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _gemma(read: SentencePiece, named: Mapping[str, Token]) -> Tokenizer:
    vocabulary = {piece.text: number for number, piece in enumerate(read.pieces)}
    unknown = named["unk_token"].content if "unk_token" in named else ""
    _check_unknown(unknown, vocabulary, bytes_too=True)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_by_ids(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _backend(read: SentencePiece, added: Mapping[int, Token], *, legacy: bool) -> Tokenizer:
    texts = [piece.text for piece in read.pieces]
    if read.kind == BPE:
        # A token that is listed at the id of a piece is that piece, but for a text that another piece keeps.
        kept = {text for number, text in enumerate(texts) if number not in added}
        texts = [
            added[number].content if number in added and added[number].content not in kept else text
            for number, text in enumerate(texts)
        ]
    whole = [text for text, piece in zip(texts, read.pieces, strict=True) if piece.kind == Kind.USER_DEFINED]
    tokenizer = Tokenizer(_backend_model(read, texts, whole=bool(whole)))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(read, legacy=legacy))
    cuts: list[Any] = []
    if read.prefix:
        scheme = "always" if legacy else "first"
        cuts.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False))
    if whole:
        pattern = "|".join(re.escape(text) for text in sorted(whole, key=len, reverse=True))
        cuts.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if read.byte_fallback:
        steps.append(decoders.ByteFallback())
    if read.prefix:
        steps += [decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    elif read.byte_fallback:
        steps.append(decoders.Fuse())
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _backend_model(read: SentencePiece, texts: list[str], *, whole: bool) -> Any:
    """whole: there are pieces that are never merged."""
    if read.kind == UNIGRAM:
        scored = [(text, piece.score) for text, piece in zip(texts, read.pieces, strict=True)]
        return models.Unigram(vocab=scored, unk_id=read.unk_id, byte_fallback=read.byte_fallback)
    normal = {
        text: (-piece.score, number)
        for number, (text, piece) in enumerate(zip(texts, read.pieces, strict=True))
        if piece.kind == Kind.NORMAL
    }
    ranked = [
        (*rank, text[:length], text[length:])
        for text, rank in normal.items()
        for length in range(1, len(text))
        if text[:length] in normal and text[length:] in normal
    ]
    _check_unknown(read.unk_piece, texts, bytes_too=read.byte_fallback)
    return models.BPE(
        vocab={text: number for number, text in enumerate(texts)},
        merges=[(left, right) for _, _, left, right in sorted(ranked)],
        unk_token=read.unk_piece,
        fuse_unk=True,
        byte_fallback=read.byte_fallback,
        ignore_merges=whole,
    )


def _check_unknown(text: str, vocabulary: Collection[str], *, bytes_too: bool) -> None:
    """ValueError: there is nothing for a character without a piece, which the library finds out where it has one."""
    has_bytes = bytes_too and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if text not in vocabulary and not has_bytes:
        raise ValueError(f"there is no piece {text!r}")


def _normalizers(read: SentencePiece, *, legacy: bool) -> list[Any]:
    steps: list[Any] = []
    if read.charsmap:
        steps.append(normalizers.Precompiled(read.charsmap))
    if read.remove_extra_spaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if read.escape_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if read.prefix and legacy:  # Metaspace puts no space before one
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    return steps
