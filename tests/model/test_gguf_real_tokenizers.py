"""Parts of real vocabularies as a GGUF has them: the ids are those that the models' own tokenizers give.

The parts and the ids are made by `data/tokenizers/make.py`.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import CohereTokenizer, GemmaTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2 import tokenization_qwen2
from transformers.tokenization_utils_base import generate_merges

from bedplate.model import gguf_split
from bedplate.model.tokenizer_files import TokenizerFiles, read_tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
FILES = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(DATA.glob("*.json"))}
NASTY = [
    *FILES["qwen2"]["texts"],
    "",
    " ",
    "  leading,  two  and   three,  trailing   ",
    "\n\n\r\n \t\n\t x\n ",
    "It's don'T WE'LL they'Ve 'tis I'd",
    "١٢٣४५६ 1234567 3.14159 ½ Ⅷ ²",
    "e\u0301 \u1100\u1161\u11a8 가 Ａ ﬁ \u212b",
    "👩‍👩‍👧‍👦🇩🇪\ufe0f \u200b\ufeff\u00ad \x01\x07\x1f\x7f",
    "日本語のテキスト。한국어 العَرَبِيَّة עִבְרִית ไทย हिन्दी ქართული",
    "for (i=0;i<n;++i){a[i]+=b[i]<<2;}  // ===>\n\t#include <x.h>",
    "camelCaseHTTPServer XMLÉcole ǅ ʰ",
    "▁ ▁▁a▁ a▁b",
    "\u2028\u2029\u00a0\u3000x\u00a0y",
]
MIXED = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from(NASTY), st.sampled_from(["  ", "\n", "'s", "12", "▁"])),
    max_size=6,
).map("".join)


def write(path: Path, name: str, **changes: Any) -> Path:
    content = FILES[name]
    writer = gguf.GGUFWriter(path, content["architecture"])
    for key, value in {**content["fields"], **changes}.items():
        full = f"tokenizer.ggml.{key}"
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(full, value)
        elif isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        else:
            writer.add_string(full, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenizerFiles]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: read_tokenizer(write(folder / f"{name}.gguf", name)) for name in FILES}


@pytest.fixture(scope="module")
def ours() -> dict[str, Tokenizer]:
    return {name: rebuilt(name) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_the_models_own_tokenizer(name: str, ours: dict[str, Tokenizer]) -> None:
    content = FILES[name]
    assert len(content["texts"]) == len(content["expected"]) > 40
    for text, ids in zip(content["texts"], content["expected"], strict=True):
        assert ours[name].encode(text, add_special_tokens=False).ids == ids, text


@pytest.mark.parametrize("name", FILES)
def test_text_comes_back(name: str, ours: dict[str, Tokenizer]) -> None:
    composed = {"qwen2", "command-r"}
    for text in FILES[name]["texts"]:
        ids = ours[name].encode(text, add_special_tokens=False).ids
        back = ours[name].decode(ids)
        assert back == text or name in composed, text


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("llama-bpe", True),
        ("tekken", True),
        ("llama-spm", True),
        ("phi-3", True),
        ("qwen2", False),
        ("gpt-2", False),
    ],
)
def test_the_first_token_is_added_where_llama_cpp_adds_it(
    name: str, first: bool, read: dict[str, TokenizerFiles], ours: dict[str, Tokenizer], tmp_path: Path
) -> None:
    assert (ours[name].encode("a").ids[0] == read[name].bos_id) == first
    path = write(tmp_path / "a.gguf", name, add_bos_token=not first)
    other = read_tokenizer(path)
    found = Tokenizer.from_str(other.tokenizer_json.decode()).encode("a").ids
    assert (found[0] == other.bos_id) != first
    path = write(tmp_path / "b.gguf", name, add_eos_token=True)
    found = Tokenizer.from_str(read_tokenizer(path).tokenizer_json.decode()).encode("a").ids
    assert found[-1] == read[name].eos_ids[0]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama-bpe", ["<|end_of_text|>", "<|eot_id|>"]),
        ("qwen2", ["<|endoftext|>", "<|im_end|>"]),
        ("phi-3", ["<|endoftext|>", "<|end|>"]),
        ("llama-spm", ["</s>"]),
    ],
)
def test_tokens_that_end_a_turn(
    name: str, ends: list[str], read: dict[str, TokenizerFiles], ours: dict[str, Tokenizer]
) -> None:
    assert [ours[name].id_to_token(one) for one in read[name].eos_ids] == ends


def test_special_tokens_of_phi_3_take_the_space_behind_them(ours: dict[str, Tokenizer]) -> None:
    for text in ("<|user|>\nHello<|end|>\n<|assistant|>\n", "<|user|>Hello<|end|><|assistant|>"):
        ids = ours["phi-3"].encode(text, add_special_tokens=False).ids
        assert [ours["phi-3"].id_to_token(one) for one in ids] == [
            "<|user|>",
            "▁Hello",
            "<|end|>",
            "<|assistant|>",
        ]


def vocabulary(name: str) -> tuple[dict[str, int], list[Any]]:
    fields = FILES[name]["fields"]
    merges = [tuple(merge.split(" ")) for merge in fields.get("merges", [])]
    return {token: number for number, token in enumerate(fields["tokens"])}, merges


@settings(max_examples=150, deadline=None)
@given(text=MIXED)
@pytest.mark.parametrize("name", ["qwen2", "gpt-2", "llama-spm", "command-r"])
def test_any_text_gives_the_ids_of_transformers_class(name: str, text: str) -> None:
    if (
        name == "llama-spm"
    ):  # before a space, the class leaves out the first one, which the models' own files do not
        text = text.lstrip(" ▁")
    found = rebuilt(name).encode(text, add_special_tokens=False).ids
    assert found == classes()[name].encode(text, add_special_tokens=False).ids


@cache
def rebuilt(name: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        files = read_tokenizer(write(Path(folder, "a.gguf"), name))
    return Tokenizer.from_str(files.tokenizer_json.decode())


@cache
def classes() -> dict[str, Tokenizer]:
    """The backends of transformers' own classes, of the same parts of vocabularies."""
    vocab, merges = vocabulary("qwen2")
    qwen2 = Qwen2Tokenizer(vocab=vocab, merges=merges)
    vocab, merges = vocabulary("gpt-2")
    gpt2 = GPT2Tokenizer(vocab=vocab, merges=merges)
    vocab, _ = vocabulary("llama-spm")
    scores = dict(zip(vocab, FILES["llama-spm"]["fields"]["scores"], strict=True))
    llama = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), legacy=True)
    vocab, merges = vocabulary("command-r")
    cohere = CohereTokenizer(vocab=vocab, merges=merges)
    found: dict[str, Any] = {"qwen2": qwen2, "gpt-2": gpt2, "llama-spm": llama, "command-r": cohere}
    backends = {name: tokenizer.backend_tokenizer for name, tokenizer in found.items()}
    for name, backend in backends.items():
        fields = FILES[name]["fields"]
        marked = zip(fields["tokens"], fields["token_type"], strict=True)
        for token, kind in marked:
            if kind in (2, 3, 4):
                add = backend.add_tokens if kind == 4 else backend.add_special_tokens
                add([token])
    return backends


def test_patterns_are_those_of_transformers_and_tiktoken() -> None:
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(TikTokenConverter).parameters.items()
    }
    assert defaults["pattern"] == gguf_split.LLAMA3
    assert tokenization_qwen2.PRETOKENIZE_REGEX == gguf_split.QWEN2
    assert FILES["tekken"]["pattern"] == gguf_split.TEKKEN


def test_how_gpt_4o_splits_is_how_tiktoken_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    import regex

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    pattern = openai_public.o200k_base()["pat_str"]
    split = pre_tokenizers.Split(gguf_split.Regex(gguf_split.GPT4O), "isolated")
    for text in NASTY:
        assert [part for part, _ in split.pre_tokenize_str(text)] == regex.findall(pattern, text), text


# Pieces as Gemma has them: white space of several lengths is matched whole.
GEMMA = [
    *(("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2), ("<start_of_turn>", 3), ("<end_of_turn>", 3)),
    *(("\n" * count, 4) for count in range(2, 6)),
    *((" " * count, 4) for count in range(2, 6)),
    ("<table>", 4),
    *((f"<0x{byte:02X}>", 6) for byte in range(256)),
    *(
        (text, 1)
        for text in (
            "▁t",
            "he",
            "▁a",
            "in",
            "▁the",
            "re",
            "on",
            "er",
            "▁▁a",
            "▁▁▁x",
            "\n▁",
            "an",
            "and",
            "▁and",
        )
    ),
    *((text, 1) for text in "▁etaoinshrdlucmfwypvbgkjqxz\n\t.,ABCé日본"),
]


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(MIXED, st.text(alphabet=" \n\tthereand<>abx▁", max_size=24)))
def test_gemma_is_as_transformers_class(text: str) -> None:
    ours, theirs = (one.encode(text, add_special_tokens=False).ids for one in gemma())
    assert ours == theirs


@cache
def gemma() -> tuple[Tokenizer, Tokenizer]:
    """Ours, and transformers'."""
    tokens, types = (list(column) for column in zip(*GEMMA, strict=True))
    scores = [float(-number) if kind == 1 else -1000.0 for number, kind in enumerate(types)]
    fields = {"tokens": tokens, "token_type": types, "scores": scores, "add_space_prefix": False}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "eot_token_id": 5}
    with tempfile.TemporaryDirectory() as folder:
        files = read_tokenizer(write(Path(folder, "a.gguf"), "llama-spm", **fields, **ids))
    assert (files.bos_id, files.eos_ids) == (2, (1, 5))
    # The model's own file has 0 as the score of what is matched whole, and ▁ in it.
    vocab = {token.replace(" ", "▁"): number for number, token in enumerate(tokens)}
    own = {
        token: 0.0 if types[number] == 4 else scores[number]
        for token, number in vocab.items()
        if types[number] in (1, 4)
    }
    backend = GemmaTokenizer(vocab=vocab, merges=generate_merges(own, own)).backend_tokenizer
    backend.add_special_tokens([token for token, kind in GEMMA if kind in (2, 3)])
    backend.add_tokens(
        [AddedToken(token.replace(" ", "▁"), normalized=False) for token, kind in GEMMA if kind == 4]
    )
    return Tokenizer.from_str(files.tokenizer_json.decode()), backend
