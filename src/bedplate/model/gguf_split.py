"""How text is split before its parts are merged, by the names that llama.cpp has for it.

What the table says is what the models' own tokenizer.json says. llama.cpp writes some of these patterns in another
way, for its own regular expressions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_WITH_SLASH}"
GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """patterns: text is split by each in turn. Without one, it is split as GPT-2 does it.

    digits: each digit stands alone.  nfc: text is composed first, which the models' own files say.
    whole: a part that is a token is not merged.  begins: with the first token, where no field says so.
    """

    patterns: Sequence[str] = ()
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    begins: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        return pre_tokenizers.Sequence(
            [*digits, *steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns)]
        )

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_LLAMA3 = Splitting(patterns=(LLAMA3,), whole=True, begins=True)
SPLITTINGS: Mapping[str, Splitting] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    "qwen2": Splitting(patterns=(QWEN2,), nfc=True),
    "tekken": Splitting(patterns=(TEKKEN,), whole=True, begins=True),
    "gpt-4o": Splitting(patterns=(GPT4O,)),
    "dbrx": Splitting(patterns=(LLAMA3,)),
    "gpt-2": Splitting(),
    **dict.fromkeys(("smollm", "starcoder", "refact"), Splitting(digits=True)),
    "command-r": Splitting(digits=True, nfc=True),
}
