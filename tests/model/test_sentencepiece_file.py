"""A folder with a `tokenizer.model` alone: the ids are those of the package sentencepiece."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb
from test_gguf_real_tokenizers import MIXED, NASTY
from tokenizers import Tokenizer

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
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


def write(folder: Path, model: bytes, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    values = {"tokenizer_class": "LlamaTokenizer", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


KINDS: dict[str, dict[str, Any]] = {"llama": {}, "gemma": GEMMA, "with whole pieces": WITH_WHOLE}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    found = {}
    for kind, changes in KINDS.items():
        name = "LlamaTokenizer" if kind == "llama" else "GemmaTokenizer"
        folder = write(tmp_path_factory.mktemp(kind), trained(**changes), tokenizer_class=name)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(**changes))
        found[kind] = (Tokenizer.from_str(read_tokenizer(folder).tokenizer_json.decode()), theirs)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(kind: str, pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, theirs = pairs[kind]

    @settings(max_examples=200, deadline=None)
    @given(text=st.one_of(MIXED, st.text(alphabet=" \nthe12é▁<>abl", max_size=20)))
    def check(text: str) -> None:
        if "\0" not in text:  # where sentencepiece ends a text
            assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)

    for text in NASTY:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back(kind: str, pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, _ = pairs[kind]
    for text in NASTY:
        if "▁" not in text:  # which stands for a space
            assert ours.decode(ours.encode(text, add_special_tokens=False).ids) == text


def test_special_tokens_and_the_first_one(tmp_path: Path) -> None:
    found = read_tokenizer(write(tmp_path / "a", trained()))
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert (found.bos_id, found.eos_ids) == (1, (2,))
    ours = Tokenizer.from_str(found.tokenizer_json.decode())
    assert ours.encode("<s>the</s>", add_special_tokens=False).ids[::2] == [1, 2]
    for config, first, last in (
        ({}, 1, None),
        ({"add_bos_token": False}, None, None),
        ({"add_eos_token": True}, 1, 2),
    ):
        read = read_tokenizer(write(tmp_path / "a", trained(), **config))
        ids = Tokenizer.from_str(read.tokenizer_json.decode()).encode("the").ids
        assert (ids[0] == 1, ids[-1] == 2) == (first == 1, last == 2)
    found = read_tokenizer(write(tmp_path / "b", trained(**GEMMA), tokenizer_class="GemmaTokenizer"))
    assert (found.bos_id, found.eos_ids, found.special_tokens["bos_token"]) == (2, (1,), "<bos>")


def test_added_tokens_of_the_settings(tmp_path: Path) -> None:
    size = len(sentencepiece.SentencePieceProcessor(model_proto=trained()))
    added = {str(size): {"content": "<|end|>", "special": True}}
    folder = write(tmp_path / "a", trained(), added_tokens_decoder=added, eos_token="<|end|>")
    found = read_tokenizer(folder)
    assert (found.last_token, found.last_id, found.eos_ids) == ("<|end|>", size, (size,))
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
        ({"model_type": "unigram", "vocab_size": 330}, {}, "not of the type BPE"),
        ({"byte_fallback": False, "vocab_size": 120}, {}, "no pieces for bytes"),
        ({"normalization_rule_name": "nfkc"}, {}, "changes characters"),
        ({"remove_extra_whitespaces": True}, {}, "removes spaces"),
        ({"treat_whitespace_as_suffix": True}, {}, "spaces behind words"),
        ({}, {"legacy": False}, "legacy = False"),
        ({}, {"tokenizer_class": "T5Tokenizer"}, "'T5Tokenizer'"),
        ({}, {"tokenizer_class": None}, "tokenizer_class = None"),
        ({}, {"tokenizer_class": ["LlamaTokenizer"]}, "tokenizer_class"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    changes: dict[str, Any], config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=says) as caught:
        read_tokenizer(write(tmp_path / "a", trained(**changes), **config))
    assert "save_pretrained" in str(caught.value.hint)


def test_a_first_token_that_is_no_piece(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no piece '<bos>'"):
        read_tokenizer(write(tmp_path / "a", trained(), bos_token="<bos>"))


def test_a_piece_that_is_there_twice(tmp_path: Path) -> None:
    model = pb.ModelProto.FromString(trained())
    model.pieces.append(model.pieces[-1])
    with pytest.raises(CheckpointError, match="twice"):
        read_tokenizer(write(tmp_path / "a", model.SerializeToString()))


def test_any_damaged_file_gives_a_tokenizer_or_an_error_of_ours(tmp_path: Path) -> None:
    chosen, data = random.Random(0), trained()
    for number in range(200):
        damaged = bytearray(data)
        for _ in range(chosen.choice([1, 2, 8])):
            damaged[chosen.randrange(len(data))] = chosen.randrange(256)
        model = bytes(damaged) if number % 2 else data[: chosen.randrange(len(data))]
        try:
            read_tokenizer(write(tmp_path / "a", model))
        except BedplateError as error:
            assert error.where and error.hint
