"""An adapter's own chat template and tokenizer: used when it answers, as transformers uses them, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorder import Recorder
from toy import CHAT_TEMPLATE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bedplate import Bundle, Engine
from bedplate.errors import AdapterError, UnsupportedError

TURNS = [{"role": "system", "content": "be quick"}, {"role": "user", "content": "the fox & the dog?"}]
OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ pad_token }}"
)


@pytest.fixture
def bundle(toy_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle"))


@pytest.fixture
def folder(toy_adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_adapters["all2"], tmp_path / "adapter"))


def tokenizer_of(model: Path, **settings: Any) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(model, **settings)


def settings(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **changes}))


def add(bundle: Bundle, folder: Path, unit_cache: Path) -> None:
    bundle.add(folder, name="own", quantize="none", unit_cache=unit_cache)


def prompt(bundle: Bundle, adapter: str | None) -> str:
    with Engine(bundle, threads=1) as engine:
        return engine.tokenizer_of(adapter).render(TURNS)


def as_transformers(bundle: Bundle, folder: Path) -> None:
    """The adapter's prompt is what transformers makes with the tokenizer in the adapter's folder."""
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    text = theirs.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    with Engine(Bundle.open(bundle.path), threads=1) as engine:
        assert engine.tokenizer_of("own").encode_chat(TURNS) == expected
        session = engine.session("own")
        session.generate(TURNS, max_tokens=1)
        assert session.tokens[: len(expected)] == tuple(expected)
        session.use("all")
        session.generate(TURNS, max_tokens=1)
        assert session.last is not None and session.last.prompt_tokens == len(
            engine.tokenizer.encode_chat(TURNS)
        )
        assert text == engine.tokenizer_of("own").render(TURNS) != engine.tokenizer_of("all").render(TURNS)


def test_the_template_and_the_special_tokens_of_an_adapter_are_used_for_it_alone(
    bundle: Bundle, folder: Path, toy_model: Path, unit_cache: Path
) -> None:
    tokenizer_of(
        toy_model, chat_template=OWN, eos_token="<|im_start|>", pad_token="<|im_end|>"
    ).save_pretrained(folder)
    before = prompt(bundle, None)
    recorder = Recorder()
    bundle.add(folder, name="own", quantize="none", unit_cache=unit_cache, reporter=recorder)
    assert [notice for notice in recorder.notices if "ends a text with <|im_start|>" in notice]
    as_transformers(bundle, folder)
    assert prompt(bundle, None) == prompt(bundle, "all") == before
    record = bundle.manifest.adapters["own"]
    assert "chat_template.jinja" in record.files
    assert record.special_tokens is not None and record.special_tokens["eos_token"] == "<|im_start|>"


def test_templates_in_the_config(bundle: Bundle, folder: Path, toy_model: Path, unit_cache: Path) -> None:
    tokenizer_of(toy_model).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": OWN}]
    settings(folder, chat_template=named, pad_token="<|im_start|>")
    add(bundle, folder, unit_cache)
    as_transformers(bundle, folder)


def test_a_template_alone_gets_the_base_models_tokens(bundle: Bundle, folder: Path, unit_cache: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)
    add(bundle, folder, unit_cache)
    assert bundle.manifest.adapters["own"].special_tokens is None
    assert prompt(bundle, "own").startswith("<|im_start|>[system] be quick<|im_end|>[user]")


def test_a_folder_without_any_has_the_base_models(bundle: Bundle, folder: Path, unit_cache: Path) -> None:
    add(bundle, folder, unit_cache)
    assert prompt(bundle, "own") == prompt(bundle, None)
    assert "chat_template.jinja" not in bundle.manifest.adapters["own"].files


def refused(
    bundle: Bundle, folder: Path, unit_cache: Path, kind: type[AdapterError | UnsupportedError], says: str
) -> None:
    before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=says) as caught:
        add(bundle, folder, unit_cache)
    assert str(caught.value.where).startswith(str(folder)) and caught.value.hint
    assert {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "malformed"),
        ("{{ messages | next_years_filter }}", "malformed"),
        ("{{", "malformed"),
    ],
)
def test_a_template_that_does_not_compile(
    bundle: Bundle, folder: Path, unit_cache: Path, template: str, says: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    refused(bundle, folder, unit_cache, AdapterError, says)


def test_a_template_that_is_no_text(bundle: Bundle, folder: Path, unit_cache: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(bundle, folder, unit_cache, AdapterError, "is not UTF-8 text")


def grown(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<think>"])


def padded(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "<pad>"})


def test_a_tokenizer_that_training_changed(
    bundle: Bundle, folder: Path, toy_model: Path, unit_cache: Path
) -> None:
    tokenizer = tokenizer_of(toy_model)
    tokenizer.pad_token = "th"
    tokenizer.save_pretrained(folder)
    refused(bundle, folder, unit_cache, AdapterError, "'th'")


@pytest.mark.parametrize(("change", "token"), [(grown, "<think>"), (padded, "<pad>")])
def test_a_further_token_that_the_base_has_a_row_for(
    bundle: Bundle,
    folder: Path,
    toy_model: Path,
    unit_cache: Path,
    change: Callable[[Any], None],
    token: str,
) -> None:
    """The toy's embedding has some rows more than its tokenizer has tokens, as those of published models have."""
    tokenizer = tokenizer_of(toy_model)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    bundle.add(folder, name="new", unit_cache=unit_cache)
    with Engine(bundle) as engine:
        assert engine.tokenizer_of("new").encode(token) == [tokenizer.convert_tokens_to_ids(token)]
        assert len(engine.tokenizer_of(None).encode(token)) > 1


def test_the_base_models_own_files_are_no_reason_to_refuse(
    bundle: Bundle, folder: Path, toy_model: Path, unit_cache: Path
) -> None:
    """As they are, and as transformers saves them again, with truncation and padding of a training run."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy_model / file, folder)
    add(bundle, folder, unit_cache)
    assert prompt(bundle, "own") == prompt(bundle, None)
    bundle.remove("own")

    tokenizer = tokenizer_of(toy_model, pad_token="<|im_end|>")
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.save_pretrained(folder)
    assert (folder / "tokenizer.json").read_bytes() != (toy_model / "tokenizer.json").read_bytes()
    add(bundle, folder, unit_cache)
    assert prompt(bundle, "own") == prompt(bundle, None)
    assert CHAT_TEMPLATE in (bundle.adapters["own"].folder / "chat_template.jinja").read_text()
