"""Chat templates against transformers: the same text, or an error where it has an error."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_templates import TEMPLATES

from bedplate.errors import RunError
from bedplate.runtime.chat_template import ChatTemplate
from bedplate.runtime.messages import plain_messages

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<img>"}
SYSTEM = {"role": "system", "content": " Be brief. "}
QUESTION = {"role": "user", "content": "Hello <b>“hé”</b> & {{ no }}\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3, "units": ["C", None]}},
        }
    ],
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [QUESTION],
    "with a system message": [SYSTEM, QUESTION, {"role": "assistant", "content": ""}, QUESTION],
    "in turn": [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, QUESTION],
    "with tool calls": [QUESTION, CALL, {"role": "tool", "name": "weather", "content": '{"rain": true}'}],
    "with arguments as text": [
        QUESTION,
        {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
    ],
    "in parts": [
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}
    ],
    "with reasoning": [QUESTION, {"role": "assistant", "content": "4", "reasoning": "2 + 2"}, QUESTION],
    "with thinking": [QUESTION, {"role": "assistant", "content": "4", "thinking": "so"}, QUESTION],
    "without content": [QUESTION, {"role": "assistant"}, {"role": "robot", "content": "beep", "extra": 1.5}],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says it's <fine>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
DOCUMENTS = [{"title": "One", "text": "first"}, {"title": "Zwei", "text": "zweite"}]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of transformers, for its chat templates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models

    file: Path = tmp_path_factory.mktemp("theirs") / "tokenizer.json"
    Tokenizer(models.BPE()).save(str(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **SPECIAL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_what_it_gives_in_transformers(theirs: Any, name: str) -> None:
    source = TEMPLATES[name]
    for messages in CONVERSATIONS.values():
        for given in ({}, {"tools": [TOOL], "documents": DOCUMENTS}):
            try:
                expected = theirs.apply_chat_template(
                    messages, chat_template=source, add_generation_prompt=True, tokenize=False, **given
                )
            except Exception:
                with pytest.raises(RunError, match=r"^the chat template .+\nhint: ") as caught:
                    render(source, messages, **given)
                assert caught.value.__cause__ is not None
                continue
            content = messages[0]["content"]
            if (
                isinstance(content, list) and str(content) in expected
            ):  # Python's way of writing it, in a prompt
                with pytest.raises(RunError, match="takes text, not a list of parts"):
                    render(source, messages, **given)
                continue
            assert render(source, messages, **given) == expected


def render(source: str, messages: list[dict[str, Any]], **given: Any) -> str:
    return ChatTemplate(source).render(plain_messages(messages), special_tokens=SPECIAL, **given)


def test_the_templates_are_not_all_alike() -> None:
    """Most render, those that should fail do: a change to the list that spoils it is seen."""
    failing = set()
    for name, source in TEMPLATES.items():
        try:
            render(source, CONVERSATIONS["with a system message"])
        except RunError:
            failing.add(name)
    names = list(TEMPLATES)
    assert failing == {
        "turns must alternate",
        "an underscored name in a namespace",
        "an underscored name set in a namespace",
        *names[names.index("an attribute of an undefined name") :],
    }


def test_the_values_that_are_given_when_nothing_is(theirs: Any) -> None:
    """Every name that transformers defines, by what its template sees: a newer one with a new name fails this."""
    caught: list[dict[str, Any]] = []
    original = jinja2.Template.render

    def record(self: jinja2.Template, **values: Any) -> str:
        caught.append({**self.globals, **self.environment.filters, **values})
        return original(self, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Template, "render", record)
        theirs.apply_chat_template(
            [QUESTION], chat_template="x{{ bos_token }}", add_generation_prompt=True, tokenize=False
        )
        render("x{{ bos_token }}", [QUESTION])
    expected, found = caught
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not callable(value):
            assert found[name] == value, name


def test_a_refusal_of_the_template_names_the_roles() -> None:
    source = TEMPLATES["unknown roles are refused"]
    with pytest.raises(RunError, match=r"no role robot\nhint: .*user, robot"):
        render(source, [QUESTION, {"role": "robot", "content": "beep"}])


def test_a_template_that_writes_no_text() -> None:
    with pytest.raises(RunError, match="surrogates not allowed"):
        render(r"{{ '\ud83d' }}", [{"role": "user", "content": "a"}])


def test_a_template_of_strings_says_so_of_parts() -> None:
    with pytest.raises(RunError, match=r"hint: .*give the content of each message as text"):
        render(TEMPLATES["one text of strings alone"], CONVERSATIONS["in parts"])


def test_a_value_that_json_has_no_word_for_is_written_as_transformers_does() -> None:
    messages = [{"role": "user", "content": "x", "n": float("nan"), "big": 10**30}]
    assert render("{{ messages | tojson }}", messages) == json.dumps(messages)
