"""The tokenizer of a Hugging Face folder: put together from its files as transformers does it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import save_toy_tokenizer, toy_config

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.tokenizer_files import check_ids, read_tokenizer


def write(path: Path, **fields: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | fields))


def theirs_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the toy model, which is read soon, in the folder of a Llama."""
    made = tmp_path_factory.mktemp("small")
    toy_config().save_pretrained(made)
    save_toy_tokenizer(made, 320)
    return made


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


NEW = {"content": "<|x|>", "special": True, "lstrip": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "NoSuchTokenizer"},
        {"add_bos_token": True, "add_eos_token": True, "add_prefix_space": True},
        {"clean_up_tokenization_spaces": True, "model_max_length": 8, "padding_side": "left"},
        {"pad_token": "<|x|>"},
        {"eos_token": "<|x|>", "bos_token": "the"},
        {"unk_token": None, "mask_token": "<|x|>"},
        {"bos_token": {"__type": "AddedToken", **NEW}},
        {"image_token": "<|x|>"},
        {"extra_special_tokens": ["<|x|>", "fox"]},
        {"additional_special_tokens": ["<|x|>"]},
        {"extra_special_tokens": {"image_token": "<|x|>"}},
        {"added_tokens_decoder": {"310": NEW}},
        {"added_tokens_decoder": {"310": {**NEW, "special": False}, "311": {"content": "lazy"}}},
        {"added_tokens_decoder": {"1": {"content": "<|im_end|>", "special": True, "rstrip": True}}},
        {"added_tokens_decoder": {"310": {**NEW, "special": False}}, "mask_token": "<|x|>"},
        {"sep_token": "<|im_end|>", "cls_token": "fox", "mask_token": "<|x|>"},
        {"image_token": {"__type": "AddedToken", **NEW}},
        {"extra_special_tokens": {"boi": "fox", "pad_token": {"__type": "AddedToken", **NEW}}},
        {"additional_special_tokens": ["<|x|>"], "extra_special_tokens": []},
        {"model_specific_special_tokens": {"audio_token": "<|x|>"}},
    ],
    ids=str,
)
def test_tokens_that_settings_name_are_those_of_transformers(copied: Path, changes: dict[str, Any]) -> None:
    write(copied / "tokenizer_config.json", **changes)
    check_same(copied)


def check_same(folder: Path) -> None:
    theirs, found = theirs_of(folder), read_tokenizer(folder)
    tokenizer = Tokenizer.from_str(found.tokenizer_json.decode())
    for text in ("the fox", "the <|x|> fox<|x|>the lazy fox", "a <|im_end|> fox<|im_end|>", ""):
        assert tokenizer.encode(text).ids == theirs.encode(text), text
    assert tokenizer.get_vocab() == theirs.get_vocab()
    assert found.last_id == len(theirs) - 1
    assert found.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map": {"eos_token": {"content": "<|im_start|>", "special": True}}},
        {"special_tokens_map": {"additional_special_tokens": ["<|x|>"], "bos_token": NEW}},
        {"special_tokens_map": {"image_token": NEW, "boi_token": "<|im_end|>"}},
        {
            "special_tokens_map": {"extra_special_tokens": ["<|x|>", "fox"]},
            "tokenizer_config": {"extra_special_tokens": ["fox"]},
        },
        {
            "special_tokens_map": {"additional_special_tokens": ["<|x|>"]},
            "tokenizer_config": {"additional_special_tokens": ["lazy"]},
        },
        {"special_tokens_map": {"extra_special_tokens": {"image_token": "<|x|>"}}},
        {"added_tokens": {"lazy fox": 311, "<|x|>": 310}},
        {"added_tokens": {"<|x|>": 310, "<|im_end|>": 1}, "special_tokens_map": {"pad_token": "<|x|>"}},
    ],
    ids=str,
)
def test_older_files_count_where_no_added_tokens_are_listed(
    copied: Path, files: dict[str, dict[str, Any]], listed: bool
) -> None:
    for name, fields in files.items():
        write(copied / f"{name}.json", **fields)
    if listed:
        write(copied / "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<|im_start|>"}})
    check_same(copied)


@pytest.mark.parametrize("value", [-1, "310", None, 2**40, 7])
def test_an_id_in_added_tokens_that_cannot_be(copied: Path, value: Any) -> None:
    write(copied / "added_tokens.json", **{"<|x|>": value})
    with pytest.raises(CheckpointError, match=r"<\|x\|>") as caught:
        read_tokenizer(copied)
    assert caught.value.where == str(copied / "added_tokens.json")


def test_a_tokenizer_for_each_version_of_transformers(copied: Path) -> None:
    write(copied / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    with pytest.raises(UnsupportedError, match="fast_tokenizer_files"):
        read_tokenizer(copied)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast"])
def test_text_is_split_as_tokenizer_json_says_whatever_the_class(kind: str, copied: Path) -> None:
    """transformers 5 builds the tokenizers of some classes anew, by rules that the model was not trained with."""
    trained = Tokenizer(models.BPE(vocab={"1": 0, "2": 1, "12": 2, "<|im_end|>": 3}, merges=[("1", "2")]))
    trained.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    trained.save(str(copied / "tokenizer.json"))
    (copied / "generation_config.json").unlink(missing_ok=True)
    write(copied / "config.json", eos_token_id=None, bos_token_id=None)
    (copied / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    theirs = theirs_of(copied)
    (copied / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    found = Tokenizer.from_str(read_tokenizer(copied).tokenizer_json.decode())
    assert found.encode("1212").ids == theirs.encode("1212") == [0, 1, 0, 1]


def test_splitting_special_tokens_is_refused(copied: Path) -> None:
    write(copied / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(UnsupportedError, match="split_special_tokens"):
        read_tokenizer(copied)


def test_ids_beyond_the_embedding(copied: Path) -> None:
    found = read_tokenizer(copied)
    assert found.last_id == 309
    check_ids(found, 310, where=copied)
    with pytest.raises(
        CheckpointError, match=r"ids up to 309 .*, but the embedding of the model has 309 rows"
    ):
        check_ids(found, 309, where=copied)


TEMPLATES = st.fixed_dictionaries(
    {},
    optional={
        "chat_template.jinja": st.sampled_from(["file\r\n", ""]),
        "additional_chat_templates/default.jinja": st.just("folder default"),
        "additional_chat_templates/tool_use.jinja": st.just("folder tools"),
        "chat_template.json": st.just('{"chat_template": "of a processor"}'),
        "chat_template": st.sampled_from(
            [
                "setting",
                [{"name": "default", "template": "listed"}, {"name": "rag", "template": "listed rag"}],
                [{"name": "rag", "template": "listed rag"}],
                {"default": "mapped", "rag": "mapped rag"},
                None,
            ]
        ),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(templates=TEMPLATES)
def test_the_chat_template_that_counts_is_that_of_transformers(
    small: Path, tmp_path_factory: pytest.TempPathFactory, templates: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(small, tmp_path_factory.mktemp("templates") / "model"))
    (folder / "additional_chat_templates").mkdir()
    write(folder / "tokenizer_config.json", chat_template=templates.get("chat_template"))
    for name, content in templates.items():
        if "." in name:
            (folder / name).write_text(content, newline="")
    try:
        found = read_tokenizer(folder).chat_template
    except UnsupportedError as error:
        assert "no chat template is the default one" in str(error)
        with pytest.raises(ValueError, match="multiple chat templates"):
            theirs_of(folder).get_chat_template()
    else:
        theirs = theirs_of(folder)
        assert found == (None if theirs.chat_template is None else theirs.get_chat_template())


@pytest.mark.parametrize(
    "value", [1, True, ["a"], [{"name": "default"}], [{"name": "default", "template": 1}]]
)
def test_a_chat_template_that_is_none(copied: Path, value: Any) -> None:
    write(copied / "tokenizer_config.json", chat_template=value)
    with pytest.raises(CheckpointError, match="chat_template must be a text"):
        read_tokenizer(copied)


def test_a_chat_template_that_is_not_utf8(copied: Path) -> None:
    (copied / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(CheckpointError, match="is not UTF-8") as caught:
        read_tokenizer(copied)
    assert caught.value.where == str(copied / "chat_template.jinja")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["<|im_end|>", "", "1", "<|x|>", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "1", "default", "name", "template", "lstrip"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
NAMES = """bos_token eos_token pad_token image_token chat_template added_tokens_decoder extra_special_tokens
additional_special_tokens eos_token_id bos_token_id tokenizer_class"""
SETTINGS = st.dictionaries(st.sampled_from(NAMES.split()), VALUES, max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=SETTINGS)
def test_any_settings_give_a_tokenizer_or_an_error_of_ours(
    small: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(small, tmp_path_factory.getbasetemp() / "any", dirs_exist_ok=True))
    older = ("special_tokens_map.json", "added_tokens.json")
    for name in ("tokenizer_config.json", "generation_config.json", *older):
        (folder / name).write_text(json.dumps(changes))
    try:
        read_tokenizer(folder)
    except BedplateError as error:
        assert error.where and error.hint
