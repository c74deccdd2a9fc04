"""The tokenizer of a GGUF: rebuilt from its fields, each of which is checked."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_edit import replaced
from package_model import smollm2_gguf
from tokenizers import Tokenizer

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.tokenizer_files import read_tokenizer

GGUF = smollm2_gguf()


def write_gguf(
    path: Path,
    *,
    model: str | None = "gpt2",
    pre: str = "smollm",
    add_bos: bool = False,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """Bytes a to d, a merge, a control token, and a user-defined one."""
    writer = gguf.GGUFWriter(path, "llama")
    if model is not None:
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["<s>", "a", "b", "c", "d", "ab", "<think>", "</s>"])
        writer.add_token_types([3, 1, 1, 1, 1, 1, 4, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(6)
        writer.add_add_bos_token(add_bos)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_a_gguf_that_adds_its_first_token(tmp_path: Path) -> None:
    for add_bos in (False, True):
        write_gguf(tmp_path / "a.gguf", add_bos=add_bos)
        found = read_tokenizer(tmp_path / "a.gguf")
        tokenizer = Tokenizer.from_str(found.tokenizer_json.decode())
        assert tokenizer.encode("abc<think>d</s>").ids == [0] * add_bos + [5, 3, 6, 4, 7]
        assert tokenizer.decode([5, 6, 4, 7]) == "ab<think>d"
        assert (found.bos_id, found.eos_ids, found.chat_template) == (0, (7, 6), None)
        assert read_tokenizer(tmp_path / "a.gguf") == found, "equal tokenizers are equal bytes"


@pytest.mark.parametrize(
    ("model", "pre"), [("gpt2", "qwen35"), ("gpt2", "default"), ("llama", "smollm"), ("t5", "default")]
)
def test_a_gguf_whose_way_to_split_text_is_unknown(tmp_path: Path, model: str, pre: str) -> None:
    write_gguf(tmp_path / "a.gguf", model=model, pre=pre)
    with pytest.raises(UnsupportedError, match=f"'{model}' with the pre-tokenizer '{pre}'") as caught:
        read_tokenizer(tmp_path / "a.gguf")
    assert "Hugging Face folder" in str(caught.value.hint)


def test_a_gguf_without_a_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", model=None)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        read_tokenizer(tmp_path / "a.gguf")


def test_a_truncated_gguf(tmp_path: Path) -> None:
    with GGUF.open("rb") as file:
        (tmp_path / "a.gguf").write_bytes(file.read(100_000))
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        read_tokenizer(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("ggml.eos_token_id", -1, "no token -1"),
        ("ggml.eos_token_id", 8, "no token 8"),
        ("ggml.bos_token_id", -1, "no token -1"),
        ("ggml.bos_token_id", 1.5, "no token 1.5"),
        ("ggml.eot_token_id", "x", "no token 'x'"),
        ("ggml.padding_token_id", 99, "no token 99"),
        ("ggml.bos_token_id", ["a"], "no token 'a'"),
        ("ggml.add_bos_token", 1, "must be true or false"),
        ("ggml.tokens", "abc", "must be a list of str"),
        ("ggml.tokens", [1, 2], "must be a list of str"),
        ("ggml.token_type", None, "must be a list of int"),
        ("ggml.token_type", [1], "8 tokens, but 1 token types"),
        ("ggml.merges", None, "must be a list of str"),
        ("ggml.merges", ["a b c"], "does not have two tokens"),
        ("ggml.merges", ["a z"], "not a tokenizer"),
        ("chat_template", 3, "chat_template must be a text"),
    ],
)
def test_a_field_that_is_wrong_is_named(field: str, value: Any, says: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", edit=replaced(f"tokenizer.{field}", value))
    with pytest.raises(CheckpointError, match=says) as caught:
        read_tokenizer(tmp_path / "a.gguf")
    assert caught.value.where == str(tmp_path / "a.gguf") and caught.value.hint


def test_a_first_token_that_is_not_there(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", add_bos=True, edit=replaced("tokenizer.ggml.bos_token_id", None))
    with pytest.raises(CheckpointError, match="there is no bos_token_id"):
        read_tokenizer(tmp_path / "a.gguf")


def test_any_damaged_file_gives_a_tokenizer_or_an_error_of_ours(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf")
    data, chosen = (tmp_path / "a.gguf").read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chosen.choice([1, 1, 2, 4])):
            damaged[chosen.randrange(len(data))] = chosen.choice([0, 1, 127, 128, 255, chosen.randrange(256)])
        (tmp_path / "b.gguf").write_bytes(damaged)
        try:
            read_tokenizer(tmp_path / "b.gguf")
        except BedplateError as error:
            assert error.where and error.hint
