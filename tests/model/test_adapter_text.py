"""Two tokenizers give the same ids, or the part in which they differ is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from toy import save_toy_tokenizer

from bedplate.errors import AdapterError, BedplateError, UnsupportedError
from bedplate.model.adapter.text import AdapterText, read_text
from bedplate.model.adapter.tokenizer import BaseTokenizer

SPECIAL = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
Change = Callable[[Tokenizer], Any]


VOCABULARY = 310  # of the toy tokenizer: a token more has no row


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_toy_tokenizer(folder, 320)
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "adapter"))


@pytest.fixture
def base(model: Path) -> BaseTokenizer:
    return BaseTokenizer(model / "tokenizer.json", SPECIAL)


def change(folder: Path, edit: Change) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    edit(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


def rewrite(folder: Path, file: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / file).read_text())
    edit(data)
    (folder / file).write_text(json.dumps(data))


def refused(folder: Path, base: BaseTokenizer, says: str, kind: type[BedplateError] = AdapterError) -> None:
    with pytest.raises(kind, match=says) as caught:
        read_text(folder, base, vocab=VOCABULARY)
    assert str(caught.value.where).startswith(str(folder)) and caught.value.hint


def set_part(part: str, value: Any) -> Change:
    return lambda tokenizer: setattr(tokenizer, part, value)


def begins_with(token: str, number: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, number)]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "edit",
    [
        lambda tokenizer: tokenizer.enable_truncation(4),
        lambda tokenizer: tokenizer.enable_padding(length=9),
        set_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)),
        set_part("pre_tokenizer", pre_tokenizers.Sequence([BYTES])),
        set_part("post_processor", processors.ByteLevel(trim_offsets=True)),
        set_part(
            "post_processor", processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        ),
        lambda tokenizer: setattr(tokenizer.model, "continuing_subword_prefix", ""),
        lambda tokenizer: setattr(tokenizer.model, "fuse_unk", True),
        lambda tokenizer: tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=True)]),
    ],
)
def test_what_no_id_depends_on_may_differ(
    folder: Path, base: BaseTokenizer, model: Path, edit: Change
) -> None:
    change(folder, edit)
    assert (folder / "tokenizer.json").read_bytes() != (model / "tokenizer.json").read_bytes()
    read_text(folder, base, vocab=VOCABULARY)


def test_merges_of_another_version_may_be_pairs_or_texts(folder: Path, base: BaseTokenizer) -> None:
    def as_text(data: dict[str, Any]) -> None:
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]

    rewrite(folder, "tokenizer.json", as_text)
    read_text(folder, base, vocab=VOCABULARY)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (set_part("pre_tokenizer", pre_tokenizers.Whitespace()), "cuts text into words in another way"),
        (
            set_part("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES])),
            "pre_tokenizer is .*Digits",
        ),
        (set_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "pre_tokenizer"),
        (set_part("pre_tokenizer", None), "pre_tokenizer is null"),
        (set_part("normalizer", normalizers.Lowercase()), "changes text before it cuts it.*Lowercase"),
        (set_part("post_processor", begins_with("<|im_start|>", 0)), "puts tokens before and after a text"),
        (set_part("decoder", None), "makes text of tokens"),
        (lambda tokenizer: setattr(tokenizer.model, "byte_fallback", True), "cuts words into tokens"),
        (lambda tokenizer: setattr(tokenizer.model, "dropout", 0.1), "cuts words into tokens"),
        (lambda tokenizer: setattr(tokenizer.model, "unk_token", "<|im_end|>"), "cuts words into tokens"),
        (lambda tokenizer: tokenizer.add_tokens(["<new>"]), "has the token '<new>'"),
        (lambda tokenizer: tokenizer.add_tokens(["th"]), "looks for 'th' in text in another way"),
        (
            lambda tokenizer: tokenizer.add_special_tokens([AddedToken("<|im_end|>", lstrip=True)]),
            "looks for '<|im_end|>' in text in another way",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_ids_depend_on_may_not(folder: Path, base: BaseTokenizer, edit: Change, says: str) -> None:
    change(folder, edit)
    refused(folder, base, says.replace("|", r"\|"))


def test_other_ids(folder: Path, base: BaseTokenizer) -> None:
    def swap(data: dict[str, Any]) -> None:
        vocab = data["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    rewrite(folder, "tokenizer.json", swap)
    refused(folder, base, "gives '[ab]' the id")


def test_other_merges(folder: Path, base: BaseTokenizer) -> None:
    rewrite(folder, "tokenizer.json", lambda data: data["model"]["merges"].reverse())
    refused(folder, base, "cuts words into tokens in another way")


def test_a_smaller_vocabulary(folder: Path, base: BaseTokenizer) -> None:
    save_toy_tokenizer(folder, 300)
    refused(folder, base, "lacks 10 tokens of the bundle's")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_a_tokenizer_that_passes_gives_the_same_ids(model: Path, text: str) -> None:
    """Each change that is let through, at once."""
    ours, other = (Tokenizer.from_file(str(model / "tokenizer.json")) for _ in range(2))
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False, trim_offsets=False)])
    other.post_processor = processors.ByteLevel(trim_offsets=True)
    other.model.continuing_subword_prefix = ""
    other.model.fuse_unk = True
    assert ours.encode(text).ids == other.encode(text).ids


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b"\xff", "not a tokenizer"),
        ("tokenizer_config.json", b"{", "cannot be read as JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "nested too deeply"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", b'{"bos_token": {"a": 1}}', "bos_token must be a token"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder must be an object"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": "y"}}',
            "an id in added_tokens_decoder must be a number",
        ),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template must be a text.* got 3"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', "chat_template must be"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "chat_template must be text that UTF-8"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "default", "template": 3}]}',
            "chat_template must be",
        ),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}', "bos_token must be text that UTF-8"),
        ("special_tokens_map.json", b"[]", "is not a JSON object"),
        ("tokenizer_config.json", b'{"mask_token": "<mask>"}', "has the token '<mask>'"),
        ("tokenizer_config.json", b'{"extra_special_tokens": ["<tool>"]}', "has the token '<tool>'"),
        ("tokenizer_config.json", b'{"additional_special_tokens": ["th"]}', "takes 'th' for one token"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"320": {"content": "<x>"}}}',
            "gives '<x>' the id 320",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"1": {"content": "<|im_start|>"}}}',
            "the id 1, the bundle's gives it 0",
        ),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"0": {"content": "<|im_start|>", "rstrip": true}}}',
            "looks for '<.im_start.>'",
        ),
        ("added_tokens.json", b'{"<x>": 320}', "gives '<x>' the id 320"),
    ],
)
def test_files_that_are_refused(
    folder: Path, base: BaseTokenizer, file: str, content: bytes, says: str
) -> None:
    (folder / file).write_bytes(content)
    refused(folder, base, says)


def test_a_template_by_another_name_than_default(folder: Path, base: BaseTokenizer) -> None:
    rewrite(
        folder,
        "tokenizer_config.json",
        lambda data: data.update(chat_template=[{"name": "rag", "template": "x"}]),
    )
    refused(folder, base, "no chat template is the default one; there is: rag", UnsupportedError)


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_a_vocabulary_that_cannot_be_compared(folder: Path, base: BaseTokenizer, file: str) -> None:
    (folder / file).write_bytes(b"")
    read_text(folder, base, vocab=VOCABULARY)
    (folder / "tokenizer.json").unlink()
    refused(folder, base, r"there is no tokenizer\.json", UnsupportedError)


def test_a_tokenizer_for_each_version_of_transformers(folder: Path, base: BaseTokenizer) -> None:
    rewrite(
        folder,
        "tokenizer_config.json",
        lambda data: data.update(fast_tokenizer_files=["tokenizer.4.0.0.json"]),
    )
    refused(folder, base, "fast_tokenizer_files", UnsupportedError)


def test_special_tokens_as_the_template_sees_them(folder: Path, base: BaseTokenizer) -> None:
    fields = {
        "eos_token": {"__type": "AddedToken", "content": "<|im_start|>"},
        "pad_token": None,
        "add_bos_token": True,
        "sep_token": "<|im_end|>",
        "extra_special_tokens": {"tool_token": "<|im_end|>"},
    }
    rewrite(folder, "tokenizer_config.json", lambda data: data.update(fields))
    expected = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_start|>",
        "sep_token": "<|im_end|>",
        "tool_token": "<|im_end|>",
    }
    assert read_text(folder, base, vocab=VOCABULARY).special_tokens == expected
    from transformers import AutoTokenizer

    (folder / "config.json").write_text("{}")
    rewrite(folder, "tokenizer_config.json", lambda data: data.update(tokenizer_class="TokenizersBackend"))
    assert AutoTokenizer.from_pretrained(folder).special_tokens_map == expected
    more = {"\ud800_token": "<|im_end|>", "a b_token": "<|im_end|>"}
    rewrite(folder, "tokenizer_config.json", lambda data: data.update(more))
    assert read_text(folder, base, vocab=VOCABULARY).special_tokens == expected, "no template can name them"


@pytest.mark.parametrize("numbered", [False, True])
def test_the_older_map_of_special_tokens_counts_where_tokens_have_no_numbers(
    folder: Path, base: BaseTokenizer, numbered: bool
) -> None:
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_start|>"}')
    settings: dict[str, Any] = {"tokenizer_class": "TokenizersBackend"}
    if numbered:
        settings["added_tokens_decoder"] = {
            "1": {"content": "<|im_end|>", "normalized": False, "special": True}
        }
    rewrite(folder, "tokenizer_config.json", lambda data: data.update(settings))
    found = read_text(folder, base, vocab=VOCABULARY).special_tokens
    assert found is not None and found["eos_token"] == ("<|im_end|>" if numbered else "<|im_start|>")
    from transformers import AutoTokenizer

    (folder / "config.json").write_text("{}")
    assert AutoTokenizer.from_pretrained(folder).special_tokens_map == found


def test_files_come_before_the_setting(folder: Path, base: BaseTokenizer) -> None:
    from transformers import AutoTokenizer

    (folder / "config.json").write_text("{}")
    more = folder / "additional_chat_templates"
    more.mkdir()
    for file, content in ((folder / "chat_template.jinja", "file"), (more / "default.jinja", "default")):
        file.write_text(content)
        theirs = AutoTokenizer.from_pretrained(folder).get_chat_template()
        assert read_text(folder, base, vocab=VOCABULARY).chat_template == theirs == content
    for file in (more / "default.jinja", folder / "chat_template.jinja"):
        file.unlink()
    (more / "tool_use.jinja").write_text("tools")
    refused(folder, base, "there is: tool_use", UnsupportedError)


def test_a_file_and_a_folder_without_text_have_none(tmp_path: Path, base: BaseTokenizer) -> None:
    nothing = AdapterText(chat_template=None, special_tokens=None)
    (tmp_path / "a.gguf").touch()
    for place in (tmp_path / "a.gguf", tmp_path):
        assert read_text(place, base, vocab=VOCABULARY) == nothing
