from __future__ import annotations

import enum
import warnings
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from bedplate.errors import RunError
from bedplate.runtime.messages import plain_messages

TEXT_PART = {"type": "text", "text": "hi"}


class Role(enum.StrEnum):
    USER = "user"


def nested(depth: int, inside: Any = "x") -> Any:
    for _ in range(depth):
        inside = [inside]
    return inside


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": [TEXT_PART, TEXT_PART]}],
        [{"role": "user", "content": (TEXT_PART,)}],
        [{"role": "user", "content": []}],
        [{"role": "user"}],
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"arguments": {"a": None, "b": [1, 2.5, True]}}],
            }
        ],
        [{"role": "assistant", "content": "4", "reasoning_content": "r", "thinking": "t"}],
        [{"role": "assistant", "content": "4", "thinking": "t"}],
        [{"role": "assistant", "content": "4", "reasoning": "g", "thinking": None}],
        [MappingProxyType({"role": Role.USER, "content": "hi"})],
        ({"role": "user", "content": "hi", "n": np.float64(1.5)},),
    ],
)
def test_messages_are_shown_to_a_template_as_in_transformers(messages: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import chat_template_utils as theirs
    plain = theirs._plain_template_data(theirs._normalize_chat_messages(messages))
    found = plain_messages(messages)
    assert found == theirs._alias_reasoning_fields(plain)
    assert all(type(message["role"]) is str for message in found)


def test_the_copy_is_the_templates_alone() -> None:
    message = {"role": "user", "content": [dict(TEXT_PART)]}
    plain_messages([message])[0]["content"][0]["text"] = "changed"
    assert message == {"role": "user", "content": [TEXT_PART]}


@pytest.mark.parametrize("messages", [None, 5, b"hi", {"role": "user", "content": "hi"}, {1}, iter([])])
def test_what_is_no_list_of_messages(messages: Any) -> None:
    with pytest.raises(RunError, match=r"messages is .*\nhint: give a list of messages: "):
        plain_messages(messages)


def test_no_messages() -> None:
    with pytest.raises(RunError, match=r"there are no messages\nhint: "):
        plain_messages([])


@pytest.mark.parametrize("message", ["hello", None, {"content": "no role"}, {"role": 3}, [{"role": "user"}]])
def test_what_is_no_message(message: Any) -> None:
    with pytest.raises(RunError, match=r"messages\[1\]: not a message: .*\nhint: a message is "):
        plain_messages([{"role": "user", "content": "hi"}, message])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (5, "messages[0].content: the content is 5"),
        ({"text": "hi"}, "messages[0].content: the content is {'text': 'hi'}"),
        (["hi"], "messages[0].content[0]: not a part of text: 'hi'"),
        ([TEXT_PART, {"type": "image", "url": "x"}], "messages[0].content[1]: a part of the type 'image'"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "a part of the type 'image_url'"),
        ([{"type": "text"}], "not a part of text"),
        ([{"type": "text", "text": None}], "not a part of text"),
        ([{"text": "hi"}], "not a part of text"),
    ],
)
def test_content_that_is_no_text(content: Any, says: str) -> None:
    with pytest.raises(RunError) as caught:
        plain_messages([{"role": "user", "content": content}])
    assert str(caught.value).startswith(says) or says in caught.value.what
    assert caught.value.hint is not None and "a list of text parts" in caught.value.hint


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        (b"bytes", "messages[0].extra: it is of the type bytes"),
        ([{"a": {1, 2}}], "messages[0].extra[0].a: it is of the type set"),
        ({5: "five"}, "a name in messages[0].extra is 5"),
        ("half \ud800", "messages[0].extra is not text: its character 5 is half of a surrogate pair"),
        ({"\udcff": 1}, "a name in messages[0].extra is not text"),
    ],
)
def test_what_no_message_holds(extra: Any, where: str) -> None:
    with pytest.raises(RunError) as caught:
        plain_messages([{"role": "user", "content": "hi", "extra": extra}])
    assert where in str(caught.value) and caught.value.hint


def test_a_message_nested_a_thousand_deep() -> None:
    assert plain_messages([{"role": "user", "content": "hi", "extra": nested(60)}])
    loop: list[Any] = []
    loop.append(loop)
    for extra in (nested(1000), nested(100_000), loop):
        with pytest.raises(RunError, match=r"messages\[0\]: it is nested too deeply\nhint: "):
            plain_messages([{"role": "user", "content": "hi", "extra": extra}])


def test_a_value_that_cannot_even_be_shown() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError

    with pytest.raises(RunError, match=r"messages is of type Broken"):
        plain_messages(Broken())  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"not a message: "):
        plain_messages([nested(5000)])
