"""A folder with a `tokenizer.model` alone: the tokenizer is that of AutoTokenizer on the same folder."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from families import quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb
from test_gguf_real_tokenizers import MIXED, NASTY
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.adapter.tokenizer import BaseTokenizer
from bedplate.model.families import FAMILIES
from bedplate.model.sentencepiece_tokenizer import BACKEND, MISLABELED, REGISTERED
from bedplate.model.tokenizer_files import read_tokenizer

TEXT = [
    "the quick brown fox jumps over the lazy dog, and then the other one and another",
    "a    b     c  def f(x):\n        return x  # the 12 345",
    "été, naïve; 日本語 текст и ещё текст",
] * 8


@cache
def trained(**changes: Any) -> bytes:
    """As Llama's: bytes for what has no piece, single digits, pieces of white space."""
    options: dict[str, Any] = {
        "vocab_size": 380,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 3,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, **{**options, **changes}
    )
    return model.getvalue()


GEMMA = {
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "add_dummy_prefix": False,
}


WITH_WHOLE = {**GEMMA, "user_defined_symbols": "▁▁,▁▁▁,▁▁▁▁,<table>"}


def write(folder: Path, model: bytes, model_type: str = "llama", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    values = {"tokenizer_class": "LlamaTokenizer", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


# As people train them: for Llama, for Gemma with its pieces of spaces and lines, with sentencepiece's own settings, …
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": GEMMA,
    "with whole pieces": WITH_WHOLE,
    "whole pieces behind a space": {"user_defined_symbols": "<table>,the qu,▁▁▁"},
    "changes and removes": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False, "vocab_size": 120},
    "unigram": {"model_type": "unigram", "vocab_size": 340},
    "unigram, no bytes": {
        "model_type": "unigram",
        "vocab_size": 90,
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "user_defined_symbols": "<table>",
    },
    "unigram, no prefix": {"model_type": "unigram", "vocab_size": 340, "add_dummy_prefix": False},
}
_END = {"content": "<|end|>", "special": True}
_IMAGE = {"content": "<image>", "special": False, "normalized": True, "lstrip": True}
# A model_type, and what tokenizer_config.json says beside: the class, and what matters to it.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"add_bos_token": True}),
    "llama, legacy": ("llama", {"legacy": True, "add_eos_token": True}),
    "llama, no prefix": (
        "smollm3",
        {"add_prefix_space": False, "legacy": None, "tokenizer_class": "LlamaTokenizerFast"},
    ),
    "gemma": ("gemma2", {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "mask_token": None}),
    "gemma as llama": ("gemma", {"add_prefix_space": None, "bos_token": "<s>"}),
    "llama as gemma": (
        "llama",
        {"tokenizer_class": "GemmaTokenizer", "unk_token": {"content": "<unk>", "__type": "AddedToken"}},
    ),
    "mistral": ("mistral", {"legacy": True, "add_bos_token": True, "add_eos_token": False}),
    "phi3": ("phi3", {"legacy": False, "extra_special_tokens": ["<|sys|>"]}),
    "no class": ("llama", {"tokenizer_class": None, "legacy": None}),
    "any class": ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>"}),
    "added": ("llama", {"added_tokens_decoder": {"3": _IMAGE, "SIZE": _END}, "eos_token": "<|end|>"}),
    "added, of mistral": (
        "mistral",
        {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "SIZE": _IMAGE}},
    ),
    "more special": ("granite", {"additional_special_tokens": ["<|a|>"], "image_token": "<image>"}),
}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("model", MODELS)
def test_the_tokenizer_is_that_of_transformers(model: str, folder: str, tmp_path: Path) -> None:
    model_type, config = FOLDERS[folder]
    size = len(sentencepiece.SentencePieceProcessor(model_proto=trained(**MODELS[model])))
    config = json.loads(json.dumps(config).replace("SIZE", str(size)))
    if folder == "added":
        config["added_tokens_decoder"] = {str(size + 1): _IMAGE, str(size): _END}
    check(write(tmp_path / "model", trained(**MODELS[model]), model_type, **config))


def check(folder: Path) -> None:
    """By their parts, as adapters are compared with a base; and by the ids and the text of what is nasty."""
    found = read_tokenizer(folder)
    theirs = quiet(lambda: AutoTokenizer.from_pretrained(folder))
    (folder / "ours.json").write_bytes(found.tokenizer_json)
    backend = theirs.backend_tokenizer.to_str()
    base = BaseTokenizer(folder / "ours.json", found.special_tokens)
    assert not base.further_tokens(folder / "theirs.json", backend.encode(), vocab=len(theirs))
    assert found.special_tokens == {
        name: str(token) for name, token in theirs.special_tokens_map.items() if isinstance(token, str)
    }
    assert (found.bos_id, found.eos_ids[-1:]) == (theirs.bos_token_id, (theirs.eos_token_id,))
    ours = Tokenizer.from_str(found.tokenizer_json.decode())
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text).ids == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text


TEXTS = [
    *NASTY,
    *(" " * length + after for length in range(1, 9) for after in ("", "x")),
    "the<s> the</s>  the<|end|>   <image> the <table>the qu<pad>\n<mask>",
    "▁the quick ▁▁ brown   \n   the",
]


def test_spaces_that_are_no_pieces(tmp_path: Path) -> None:
    model = pb.ModelProto.FromString(trained())
    model.normalizer_spec.escape_whitespaces = False
    model.normalizer_spec.add_dummy_prefix = False
    check(write(tmp_path / "model", model.SerializeToString(), "mistral"))


@pytest.mark.parametrize("model", ["llama", "with whole pieces"])
def test_ids_of_the_backend_are_those_of_sentencepiece(model: str, tmp_path: Path) -> None:
    """It follows the settings of the model, with which the pieces were trained."""
    found = read_tokenizer(write(tmp_path / "a", trained(**MODELS[model]), "mistral", legacy=True))
    ours = Tokenizer.from_str(found.tokenizer_json.decode())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(**MODELS[model]))

    @settings(max_examples=100, deadline=None)
    @given(text=st.one_of(MIXED, st.text(alphabet=" \nthe12éabl", max_size=20)))
    def same(text: str) -> None:
        if "\0" not in text:  # where sentencepiece ends a text
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)

    same()


def test_classes_are_those_that_transformers_has_registered() -> None:
    """For a model_type. Mistral's own package is not what reads a `tokenizer.model` here."""
    mapping = {name: kind for name, kind in TOKENIZER_MAPPING_NAMES.items() if name in FAMILIES}
    expected = {
        name: kind.replace("MistralCommonBackend", BACKEND)
        for name, kind in mapping.items()
        if kind is not None
    }
    assert expected == REGISTERED
    wrong = MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS & set(FAMILIES)
    assert {name for name in wrong if REGISTERED[name] != BACKEND} == set(MISLABELED)


def test_added_tokens_of_the_settings(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", trained(), added_tokens_decoder={"7": {"content": "<|end|>"}})
    with pytest.raises(CheckpointError, match="the id 7"):
        read_tokenizer(folder)


def test_a_tokenizer_json_counts_before_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", trained())
    expected = read_tokenizer(folder)
    (folder / "tokenizer.json").write_bytes(expected.tokenizer_json)
    (folder / "tokenizer.model").write_text("not read")
    assert read_tokenizer(folder).tokenizer_json == expected.tokenizer_json


@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({"model_type": "word", "byte_fallback": False, "vocab_size": 30}, {}, "of words or characters"),
        ({}, {"tokenizer_class": "T5Tokenizer"}, "'T5Tokenizer'"),
        ({}, {"model_type": "qwen2"}, "'Qwen2Tokenizer'"),
        ({}, {"model_type": "cohere2", "tokenizer_class": None}, "'CohereTokenizer'"),
        ({}, {"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    changes: dict[str, Any], config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=says) as caught:
        read_tokenizer(write(tmp_path / "a", trained(**changes), **config))
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"tokenizer_class": ["LlamaTokenizer"]}, "tokenizer_class must be text"),
        ({"legacy": 1}, "legacy must be true or false"),
        ({"add_prefix_space": "yes"}, "add_prefix_space must be true or false"),
    ],
)
def test_a_setting_of_a_wrong_type(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_tokenizer(write(tmp_path / "a", trained(), **config))


@pytest.mark.parametrize("name", ["tekken.json", "tiktoken.model"])
def test_a_vocabulary_of_another_kind_beside(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", trained())
    (folder / name).write_text("{}")
    with pytest.raises(UnsupportedError, match=f"{name} beside tokenizer.model"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gemma", {"tokenizer_class": "GemmaTokenizer", "unk_token": None}),
        ("mistral", {"added_tokens_decoder": {"0": {"content": "<other>", "special": True}}}),
    ],
)
def test_nothing_for_what_is_unknown(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = pb.ModelProto.FromString(trained())
    model.pieces[5].piece = "not a byte"
    with pytest.raises(CheckpointError, match="there is no piece"):
        read_tokenizer(write(tmp_path / "a", model.SerializeToString(), model_type, **config))


def test_a_piece_that_is_there_twice(tmp_path: Path) -> None:
    model = pb.ModelProto.FromString(trained())
    model.pieces.append(model.pieces[-1])
    with pytest.raises(CheckpointError, match="twice"):
        read_tokenizer(write(tmp_path / "a", model.SerializeToString()))


@pytest.mark.parametrize("name", ["llama", "changes and removes", "unigram, no bytes"])
def test_any_damaged_file_gives_a_tokenizer_or_an_error_of_ours(name: str, tmp_path: Path) -> None:
    chosen, data = random.Random(0), trained(**MODELS[name])
    for number in range(200):
        damaged = bytearray(data)
        for _ in range(chosen.choice([1, 2, 8])):
            damaged[chosen.randrange(len(data))] = chosen.randrange(256)
        model = bytes(damaged) if number % 2 else data[: chosen.randrange(len(data))]
        try:
            found = read_tokenizer(write(tmp_path / "a", model, "mistral"))
            Tokenizer.from_str(found.tokenizer_json.decode()).encode("  the é ﬁ ½  ")
        except BedplateError as error:
            assert error.where and error.hint
