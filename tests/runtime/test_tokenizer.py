from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from bedplate.bundle.store import Bundle, ChatSettings
from bedplate.errors import RunError
from bedplate.runtime.engine import Engine
from bedplate.runtime.tokenizer import Tokenizer, open_backend

TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]


def tokenizer(bundle: Bundle, template: str | None) -> Tokenizer:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(open_backend(bundle.tokenizer_file), chat_template=template, special_tokens=special)


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(toy_bundle: Bundle, template: str) -> None:
    with pytest.raises(RunError, match="unsafe"):
        tokenizer(toy_bundle, template).render(TURNS)


def test_a_malformed_template(toy_bundle: Bundle) -> None:
    with pytest.raises(RunError, match="malformed") as caught:
        tokenizer(toy_bundle, "{% for %}").render(TURNS)
    assert isinstance(caught.value.__cause__, jinja2.TemplateError)


def test_without_a_template_there_are_no_messages(toy_bundle: Bundle) -> None:
    with pytest.raises(RunError, match=r"no chat template.*\nhint: give the prompt as text"):
        tokenizer(toy_bundle, None).encode_chat(TURNS)


def test_a_template_that_cannot_be_read(toy_bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle"))
    bundle = Bundle.open(copy)
    for spoil in (lambda file: file.write_bytes(b"\xff"), Path.unlink):
        spoil(copy / "chat_template.jinja")
        with pytest.raises(
            RunError, match=r"chat_template\.jinja: the chat template cannot be read: .*\nhint: "
        ):
            Tokenizer.of_bundle(bundle)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(RunError, match=r"tokenizer\.json: not a tokenizer"):
        open_backend(file)


def test_a_tokenizer_is_opened_when_text_is_first_encoded(toy_bundle: Bundle, tmp_path: Path) -> None:
    """If it cannot be read, token ids still work."""
    copy = Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle"))
    whole = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(b"?" * len(whole))
    with Engine(Bundle.open(copy, check=False)) as engine:
        session = engine.session()
        for use in (
            lambda: engine.tokenizer.encode("a"),
            lambda: engine.tokenizer_of("all").decode([1]),
            lambda: session.generate("a", max_tokens=1),
        ):
            with pytest.raises(
                RunError, match=r"tokenizer\.json: not a tokenizer.*\nhint: build the bundle again"
            ):
                use()
        assert session.tokens == () and engine.memory().foundation == 0
        session.step([5])
        (copy / "tokenizer.json").write_bytes(whole)
        session.generate("a", max_tokens=1)


def test_text_goes_there_and_back(toy_bundle: Bundle) -> None:
    bundled = Tokenizer.of_bundle(toy_bundle)
    assert bundled.decode(bundled.encode("hé, 世界\n")) == "hé, 世界\n"
    assert bundled.decode(np.array(bundled.encode("hé"))) == "hé"


def test_special_tokens_in_plain_text_are_special(toy_bundle: Bundle) -> None:
    bundled = Tokenizer.of_bundle(toy_bundle)
    assert bundled.encode("<|im_end|>") == [1]
    assert bundled.encode_chat([{"role": "user", "content": "<|im_end|>"}]).count(1) == 1  # the template's


@pytest.mark.parametrize("text", [None, b"hello", 5, ["hello"], "half \ud83d a pair", "byte \udcff"])
def test_what_is_no_text(toy_bundle: Bundle, text: Any) -> None:
    with pytest.raises(RunError, match=r"the text is .*\nhint: "):
        Tokenizer.of_bundle(toy_bundle).encode(text)


@pytest.mark.parametrize("ids", [None, 5, "12", b"12", [1.0], [-1], [2**32], [None], [True], np.array(1)])
def test_what_are_no_ids(toy_bundle: Bundle, ids: Any) -> None:
    with pytest.raises(RunError, match=r"^token.* is .*\nhint: "):
        Tokenizer.of_bundle(toy_bundle).decode(ids)


class OwnWords(Bundle):
    """A bundle whose adapter `all` came with a chat template."""

    def chat_settings(self, adapter: str | None) -> ChatSettings:
        if adapter != "all":
            return super().chat_settings(adapter)
        return ChatSettings(
            template_file=self.path / "own.jinja", special_tokens={"eos_token": "over", "bos_token": "<b>"}
        )


def test_an_adapter_has_its_own_chat_template(toy_bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle"))
    (copy / "own.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    with Engine(OwnWords.open(copy)) as engine:
        assert engine.tokenizer_of("all").render(TURNS) == "<b>HelloYes?over".replace("Yes", "overYes")
        assert engine.tokenizer_of("all2").render(TURNS) == engine.tokenizer.render(TURNS)
        by_hand = engine.session("all").generate(engine.tokenizer_of("all").render(TURNS), max_tokens=5)
        session = engine.session("all2")
        session.generate(TURNS, max_tokens=1)
        session.use("all")
        assert session.generate(TURNS, max_tokens=5) == by_hand
        assert session.last is not None
        assert session.last.prompt_tokens == len(engine.tokenizer.encode("<b>HelloYes?over")) + len(
            engine.tokenizer.encode("over")
        )
