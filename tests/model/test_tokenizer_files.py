"""Tokenizers: the same ids as transformers gives, from a GGUF and from a folder."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from package_model import smollm2_gguf
from tokenizers import Tokenizer, models

from bedplate.errors import CheckpointError, NotFoundError, UnsupportedError
from bedplate.model.tokenizer_files import TokenizerFiles, read_tokenizer

GGUF = smollm2_gguf()
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  \n\n\t tabs ",
    "It's 2024-11-23, and 3.14159 < 1,000,000; don't you think we'll've won?",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nclass A(B):\n\tpass\r\n",
    "<|im_start|>user\nWhat is 7+8?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><file_sep><repo_name>x/y<|im_end",
    "Ünïcödé, naïve café; 日本語のテキスト。한국어 텍스트 العربية עברית ไทย हिन्दी",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b\ufeff\x00\x07",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
    '{"name": "Ada", "born": 1815, "tags": ["a", null, true]}',
]
PIECES = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "'s", "\n", "  ", "12", "\t", "é"])
MIXED = st.lists(st.one_of(st.text(max_size=20), PIECES), max_size=12).map("".join)


@pytest.fixture(scope="module")
def read() -> TokenizerFiles:
    return read_tokenizer(GGUF)


@pytest.fixture(scope="module")
def ours(read: TokenizerFiles) -> Tokenizer:
    return Tokenizer.from_str(read.tokenizer_json.decode())


@pytest.fixture(scope="module")
def theirs() -> Any:
    """What AutoTokenizer.from_pretrained(…, gguf_file=…) builds, without its second reading of the file."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, content, settings = get_gguf_tokenizer(str(GGUF))
    backend, _ = convert_gguf_tokenizer(architecture, content)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as a Hugging Face folder."""
    made = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(made)
    (made / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return made


@pytest.fixture
def edited(folder: Path, tmp_path: Path) -> Path:
    """A copy of `folder` to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_what_the_gguf_says(read: TokenizerFiles, theirs: Any) -> None:
    assert (read.bos_id, read.eos_ids) == (1, (2,))
    assert read.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert read.chat_template == theirs.chat_template
    assert "<|im_start|>assistant" in str(read.chat_template)


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_ids_as_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(MIXED, st.text(st.sampled_from("a ½²٣一Ⅷ7x\n.é"), max_size=20)))
def test_the_same_ids_as_transformers_for_any_text(ours: Tokenizer, theirs: Any, text: str) -> None:
    """`smollm` takes every number for itself, as the model's own tokenizer.json and llama.cpp do.

    transformers does not know that, which shows where spaces stand before numbers ("  0"): feed it pieces.
    """
    pieces = [""]
    for c in text:
        if unicodedata.category(c).startswith("N"):
            pieces += [c, ""]
        else:
            pieces[-1] += c
    assert ours.encode(text).ids == [i for piece in pieces for i in theirs.encode(piece)]


def test_decodes_to_what_was_encoded(ours: Tokenizer) -> None:
    """All of the basic plane but control characters: the vocabulary lacks some, and bytes of other planes."""
    text = "\t\r\n" + "".join(
        c for c in map(chr, range(0x10000)) if unicodedata.category(c) not in ("Cc", "Cs")
    )
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_executorch_reads_it(read: TokenizerFiles, ours: Tokenizer, tmp_path: Path) -> None:
    """The C++ tokenizer of ExecuTorch's own LLM runner."""
    from pytorch_tokenizers import CppHFTokenizer

    (tmp_path / "tokenizer.json").write_bytes(read.tokenizer_json)
    cpp = CppHFTokenizer()
    cpp.load(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[2:9]:
        assert cpp.encode(text, bos=0, eos=0) == ours.encode(text).ids, text


def test_a_folder_gives_the_same(read: TokenizerFiles, folder: Path, theirs: Any) -> None:
    found = read_tokenizer(folder)
    assert (found.bos_id, found.eos_ids, found.special_tokens) == (
        read.bos_id,
        read.eos_ids,
        read.special_tokens,
    )
    assert found.chat_template == read.chat_template
    tokenizer = Tokenizer.from_str(found.tokenizer_json.decode())
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs.encode(text)


def test_merges_and_vocabulary_are_written_so_that_they_are_read_soon(
    read: TokenizerFiles, ours: Tokenizer, edited: Path
) -> None:
    data = json.loads(read.tokenizer_json)
    assert data["model"]["merges"][:2] == ["Ġ t", "Ġ a"]
    assert list(data["model"]["vocab"]) == sorted(data["model"]["vocab"])
    data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
    assert data == json.loads(ours.to_str())

    spaced = Tokenizer(models.BPE(vocab={"a": 0, " ": 1, " a": 2, "<|endoftext|>": 3}, merges=[(" ", "a")]))
    spaced.save(str(edited / "tokenizer.json"))
    (edited / "tokenizer_config.json").write_text("{}")
    found = read_tokenizer(edited).tokenizer_json.decode()
    assert json.loads(found)["model"]["merges"] == [[" ", "a"]]
    assert Tokenizer.from_str(found).encode("a a").ids == [0, 2]


def write(path: Path, **fields: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | fields))


def test_every_id_that_ends_an_answer_is_kept(edited: Path) -> None:
    write(edited / "generation_config.json", eos_token_id=[5, 2], bos_token_id=3)
    # Of no effect, as in transformers' generate: generation_config.json says what ends an answer.
    write(edited / "config.json", eos_token_id=7)
    found = read_tokenizer(edited)
    assert (found.bos_id, found.eos_ids) == (3, (5, 2))
    (edited / "generation_config.json").unlink()
    # The last one is the tokenizer's own.
    assert read_tokenizer(edited).eos_ids == (7, 2)
    write(edited / "config.json", eos_token_id=None)
    assert read_tokenizer(edited).eos_ids == (2,)


def test_where_generation_config_names_no_end_config_does(edited: Path) -> None:
    write(edited / "generation_config.json", eos_token_id=None)
    write(edited / "config.json", eos_token_id=[7, 8])
    assert read_tokenizer(edited).eos_ids == (7, 8, 2)


def test_without_configs_the_tokens_themselves_are_taken(edited: Path) -> None:
    (edited / "config.json").unlink()
    write(edited / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"}, bos_token=None)
    found = read_tokenizer(edited)
    assert (found.bos_id, found.eos_ids) == (None, (0,))
    assert found.special_tokens["eos_token"] == "<|endoftext|>"


def test_the_chat_template_in_tokenizer_config(edited: Path) -> None:
    (edited / "chat_template.jinja").unlink()
    assert read_tokenizer(edited).chat_template is None
    write(edited / "tokenizer_config.json", chat_template="one")
    assert read_tokenizer(edited).chat_template == "one"
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    write(edited / "tokenizer_config.json", chat_template=templates)
    assert read_tokenizer(edited).chat_template == "two"
    write(edited / "tokenizer_config.json", chat_template=templates[:1])
    with pytest.raises(UnsupportedError, match="there is: tool_use"):
        read_tokenizer(edited)


def test_truncation_of_the_training_run_is_dropped(edited: Path) -> None:
    tokenizer = Tokenizer.from_file(str(edited / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(edited / "tokenizer.json"))
    found = Tokenizer.from_str(read_tokenizer(edited).tokenizer_json.decode())
    assert len(found.encode("one two three four five six seven").ids) == 7


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file or folder"):
        read_tokenizer(tmp_path / "none")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        read_tokenizer(tmp_path)
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("config.json", "{", r"config\.json: cannot be read as JSON"),
        ("generation_config.json", "[]", r"generation_config\.json: is not a JSON object"),
        ("tokenizer_config.json", "[" * 5000, r"tokenizer_config\.json: is nested too deeply"),
        ("special_tokens_map.json", "3", r"special_tokens_map\.json: is not a JSON object"),
        ("config.json", '{"eos_token_id": 49152}', "no token 49152"),
        ("config.json", '{"eos_token_id": -1}', "no token -1"),
        ("config.json", '{"eos_token_id": true}', "no token True"),
        ("config.json", '{"eos_token_id": 1.0}', "no token 1.0"),
        ("config.json", '{"eos_token_id": [2, [3]]}', r"no token \[3\]"),
        ("config.json", '{"eos_token_id": {}}', "no token {}"),
        ("config.json", '{"bos_token_id": 1e999}', "no token inf"),
        ("generation_config.json", '{"eos_token_id": 99999999999999999999}', "no token 99999999999999999999"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', r"must be an object, got \[1\]"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "must be a number, got 'x'",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"-1": {"content": "a"}}}',
            "must be a number, got '-1'",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "a"}}', "gives 'a' the id 1"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": 1}}}', "must be a token"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"1": {"content": "a", "lstrip": 1}}}',
            "lstrip of",
        ),
        ("tokenizer_config.json", '{"eos_token": 1}', "eos_token must be a token, got 1"),
        ("tokenizer_config.json", '{"bos_token": ["a"]}', "bos_token must be a token"),
        ("tokenizer_config.json", '{"extra_special_tokens": "a"}', "extra_special_tokens must be a list"),
        ("tokenizer_config.json", '{"extra_special_tokens": [1]}', "extra_special_tokens must be a token"),
        ("config.json", '{"eos_token_id": "2"}', "no token '2'"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": {"content": "<x>"}}}',
            r"gives '<x>' the id 9, the tokenizer does not",
        ),
    ],
)
def test_files_that_are_damaged_or_contradict_each_other(
    edited: Path, file: str, content: str, says: str
) -> None:
    if file == "config.json":
        (edited / "generation_config.json").unlink(missing_ok=True)
    (edited / file).write_text(content)
    if file == "special_tokens_map.json":
        (edited / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=says) as caught:
        read_tokenizer(edited)
    assert caught.value.where and caught.value.where.startswith(str(edited)) and caught.value.hint
