"""Tokenizers of the kinds that models come with, small, each with a chat template that writes its special tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from package_model import smollm2_gguf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from bedplate.model.tokenizer_files import read_tokenizer
from bedplate.runtime import tokenizer

TEXT = [
    "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. <|im|> </s>"
] * 8
TURNS = (
    "{{ bos_token }}{%% for m in messages %%}{{ '%s' + m['role'] + '%s' + m['content'] + '%s' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '%s' + 'assistant' + '%s' }}{%% endif %%}"
)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A tokenizer, twice: ours and transformers'.  backend: of both."""

    backend: Tokenizer
    ours: tokenizer.Tokenizer
    theirs: Any

    def special(self, ids: list[int]) -> list[int]:
        """Of some ids, those of special tokens; an unknown character is not one that somebody wrote."""
        known = self.backend.get_added_tokens_decoder()
        unknown = self.theirs.unk_token_id
        return [one for one in ids if one in known and known[one].special and one != unknown]

    def shows(self, character: str) -> bool:
        """Some vocabularies lack a byte that only rare characters have."""
        return bool(self.backend.decode(self.backend.encode(character).ids) == character)


def toy(backend: Tokenizer, template: str, special: dict[str, str]) -> Toy:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)
    backend = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    ours = tokenizer.Tokenizer(backend, chat_template=template, special_tokens=theirs.special_tokens_map)
    return Toy(backend=backend, ours=ours, theirs=theirs)


def smollm2() -> Toy:
    files = read_tokenizer(smollm2_gguf())
    return toy(
        Tokenizer.from_str(files.tokenizer_json.decode()), str(files.chat_template), files.special_tokens
    )


def llama3() -> Toy:
    """Bytes, special tokens beside the model's vocabulary, a post-processor that begins every text."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "reserved_0"]
    backend.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
    )
    begin, end, turn = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    template = TURNS % (begin, end, turn, begin, end)
    return toy(backend, template, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})


def llama2() -> Toy:
    """Pieces that begin with spaces, unknown characters as bytes, special tokens inside the vocabulary."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # to learn words: models do without
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    backend = without_special(backend, special[3:])
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token + bos_token }}{% endif %}{% endfor %}"
    )
    return toy(backend, template, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def without_special(backend: Tokenizer, tokens: list[str]) -> Tokenizer:
    """Pieces of the vocabulary alone, as byte pieces are."""
    import json

    data = json.loads(backend.to_str())
    data["pre_tokenizer"] = None
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(data))


def unigram() -> Toy:
    """A model that would take its special tokens for pieces of text: they stand in its vocabulary."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<pad>", "</s>", "<unk>", "<turn|>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    template = TURNS % ("<turn|>", "\n", "</s>", "<turn|>", "\n")
    return toy(backend, template, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})


def spaces() -> Toy:
    """Special tokens that take the spaces beside them, one inside another, and one that looks like a word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(
        [
            AddedToken("<|end|>", rstrip=True, normalized=False),
            AddedToken("<|end|><|end|>", normalized=False),
            AddedToken("<|user|>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("<|assistant|>", rstrip=True, normalized=False),
            AddedToken("ENDOFTEXT", single_word=True, normalized=False),
        ]
    )
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "<|assistant|>\n"
    )
    return toy(backend, template, {"eos_token": "<|end|>", "pad_token": "ENDOFTEXT"})


KINDS: dict[str, Callable[[], Toy]] = {
    "smollm2": cache(smollm2),
    "llama3": cache(llama3),
    "llama2": cache(llama2),
    "unigram": cache(unigram),
    "spaces": cache(spaces),
}
