"""What can be done in a chat, beside asking, where lines come from a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, Result, failed

import bedplate
from bedplate.cli import talk as talk_module
from bedplate.cli.commands import COMMANDS
from bedplate.runtime.session import Session

Chat = Callable[..., Result]
TOKENS = 4


@pytest.fixture
def chat(command: Command, toy_bundle: bedplate.Bundle) -> Chat:
    def chat(*lines: str, options: tuple[object, ...] = ()) -> Result:
        fixed = ("--max-tokens", TOKENS, "--temperature", 0)
        return command("chat", toy_bundle.path, *fixed, *options, stdin="\n".join(lines))

    return chat


@pytest.fixture
def answer(toy_bundle: bedplate.Bundle) -> Callable[..., str]:
    """What the toy answers to the last of some questions, each answered before by the same adapter."""

    def answer(
        *questions: str, adapter: str | None = None, scale: float = 1.0, system: str | None = None
    ) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        with bedplate.Engine(toy_bundle) as engine:
            session = engine.session()
            session.use(adapter, scale=scale)
            for question in questions:
                messages.append({"role": "user", "content": question})
                messages.append(
                    {"role": "assistant", "content": session.generate(messages, max_tokens=TOKENS)}
                )
        return messages[-1]["content"]

    return answer


def said(*answers: str) -> str:
    return "".join(answer + "\n" for answer in answers)


def test_help_lists_every_command(chat: Chat) -> None:
    result = chat("/help")
    assert (result.code, result.out) == (0, "")
    for command in COMMANDS:
        assert f"{', '.join(command.names)} {command.takes}".strip() in result.err
        assert command.help in result.err


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("/retri", "do you mean /retry? "),
        ("/what is this", "/help lists"),
        ("/", "/help lists"),
        ("/Quit", "/quit"),
    ],
)
def test_an_unknown_command(chat: Chat, answer: Callable[..., str], typed: str, hint: str) -> None:
    result = chat(typed, "the fox")
    assert (result.code, result.out) == (0, said(answer("the fox")))
    assert f"error: no command {typed.split()[0]}\nhint: " in result.err and hint in result.err


def test_a_question_may_begin_with_a_slash(chat: Chat, answer: Callable[..., str]) -> None:
    assert chat(" /etc is a folder").out == said(answer(" /etc is a folder"))


def test_a_question_of_several_lines(chat: Chat, answer: Callable[..., str]) -> None:
    expected = said(answer("/the fox\n\njumps"), answer("/the fox\n\njumps", "so?"))
    assert chat('"""/the fox', "", 'jumps"""', "so?").out == expected
    assert chat('"""', "/the fox", "", "jumps", '"""', '"""so?"""').out == expected
    without_end = chat("the fox", '"""the dog', "/quit")
    assert (without_end.code, without_end.out) == (0, said(answer("the fox")))
    assert 'a text that begins with """ has no end' in without_end.err


def test_adapters(chat: Chat, answer: Callable[..., str]) -> None:
    result = chat(
        "/use all",
        "the fox",
        "/reset",
        "/adapter all2 0.5",
        "the fox",
        "/reset",
        "/adapters",
        "/use",
        "the fox",
        "/reset",
        "/use all",
        "/use base",
        "the fox",
    )
    base = answer("the fox")
    assert result.out == said(
        answer("the fox", adapter="all"), answer("the fox", adapter="all2", scale=0.5), base, base
    )
    assert "  all  rank 4, " in result.err and "* all2  rank 4, " in result.err and "  loaded\n" in result.err
    wrong = chat("/use nosuch", "/use all hot", "/use base 2", "the fox")
    assert wrong.out == said(base)
    for words in ("no adapter 'nosuch'", "the scale is hot", "the base has nothing to scale"):
        assert words in wrong.err


def test_branches(chat: Chat, answer: Callable[..., str]) -> None:
    result = chat(
        "the fox",
        "/fork",
        "the dog",
        "/fork other",
        "/use all",
        "/branch main",
        "the jug",
        "/branch",
        "/branch 1",
        "so?",
    )
    assert result.out == said(
        answer("the fox"),
        answer("the fox", "the dog"),
        answer("the fox", "the jug"),
        answer("the fox", "the dog", "so?"),
    )
    assert "* main  base, 2 questions, the last: the jug\n" in result.err
    assert "  1  base, 2 questions, the last: the dog\n" in result.err
    assert "  other  all, 2 questions, the last: the dog\n" in result.err
    wrong = chat("/fork main", "/branch nosuch", "the fox")
    assert wrong.out == said(answer("the fox"))
    assert (
        "there is a branch 'main' already" in wrong.err
        and "no branch 'nosuch'\nhint: there are: main" in wrong.err
    )


def test_retry_and_undo(chat: Chat, answer: Callable[..., str]) -> None:
    result = chat("/retry", "/undo", "the fox", "/retry", "the dog", "/undo", "so?")
    first, last = answer("the fox"), answer("the fox", "so?")
    assert result.out == said(first, first, answer("the fox", "the dog"), last)
    assert result.err.count("there is no question yet") == 2 and "forgotten: the dog\n" in result.err
    random = chat("the fox", "/retry", options=("--temperature", 5, "--max-tokens", 30)).out
    assert random[: len(random) // 2] != random[len(random) // 2 :], "each time by chance"


def test_the_system_message(chat: Chat, answer: Callable[..., str]) -> None:
    result = chat(
        "the fox",
        "/reset",
        "/system be brief",
        "the fox",
        "/reset",
        "/system",
        "the fox",
        options=("--system", "be kind"),
    )
    assert result.out == said(
        answer("the fox", system="be kind"), answer("the fox", system="be brief"), answer("the fox")
    )


def test_options_can_be_set(chat: Chat, toy_bundle: bedplate.Bundle) -> None:
    with bedplate.Engine(toy_bundle) as engine:
        options: dict[str, Any] = {"temperature": 2.0, "logit_bias": {70: 50}, "stop": ["zz"], "seed": 3}
        expected = engine.session().generate(
            [{"role": "user", "content": "the fox"}], max_tokens=6, **options
        )
    given = (
        "/set max-tokens 6",
        "/set temperature 2.0",
        '/set logit_bias {"70": 50}',
        "/set stop zz",
        "/set seed 3",
    )
    result = chat(*given, "the fox", "/set seed none", "/set")
    assert result.out == said(expected)
    assert (
        "temperature  2.0\n" in result.err
        and "seed  None\n" in result.err
        and "logit_bias  {70: 50}\n" in result.err
    )
    wrong = chat(
        "/set temprature 1", "/set xyz 1", "/set temperature hot", "/set top_p 2", "/set max_tokens", "/set"
    )
    for words in (
        "do you mean temperature?",
        "no option xyz",
        "temperature is 'hot'",
        "top_p is 2",
        "max_tokens is None",
    ):
        assert words in wrong.err
    assert "temperature  0\n" in wrong.err.replace("0.0", "0") and "top_p  0.95\n" in wrong.err


def test_save_and_load(chat: Chat, answer: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    chat("/use all 0.5", "the fox", '/set logit_bias {"70": 0.5}', f"/save {file}")
    saved = json.loads(file.read_text())
    assert (saved["adapter"], saved["scale"], saved["temperature"]) == ("all", 0.5, 0)
    assert [one["content"] for one in saved["messages"]] == [
        "the fox",
        answer("the fox", adapter="all", scale=0.5),
    ]
    result = chat("gone", f"/load {file}", "/set logit_bias {}", "so?", options=("--max-tokens", 9))
    assert result.out.splitlines()[-1] == answer("the fox", "so?", adapter="all", scale=0.5)
    empty = chat(f"/save {file}", f"/load {file}", "the fox")
    assert empty.out == said(answer("the fox"))


def test_what_cannot_be_saved_or_loaded(chat: Chat, answer: Callable[..., str], tmp_path: Path) -> None:
    for name, text in (
        ("a", "{"),
        ("b", '{"prompt": "x"}'),
        ("c", '{"messages": [5]}'),
        ("d", '{"messages": [], "adapter": "nosuch"}'),
        ("e", '{"messages": [], "top_p": 2}'),
        ("f", '{"messages": 5}'),
    ):
        (tmp_path / name).write_text(text)
    loads = (f"/load {tmp_path / name}" for name in ("a", "b", "c", "d", "e", "f", "none"))
    result = chat("the fox", "/save", f"/save {tmp_path / 'no' / 'x'}", *loads, "so?")
    assert result.code == 0 and result.out == said(answer("the fox"), answer("the fox", "so?"))
    for words in (
        "there is no file\n",
        "it cannot be saved: No such file",
        "not JSON",
        "it needs one prompt",
        "not a message: 5",
        "no adapter 'nosuch'",
        "top_p is 2",
        "messages is 5",
        "it cannot be read: No such file",
    ):
        assert words in result.err


def test_compare(chat: Chat, answer: Callable[..., str]) -> None:
    base, after = answer("the fox"), answer("the fox", "so?")
    result = chat("the fox", "/compare so?", "/compare @all2 so?", "so?")
    assert result.out.startswith(f"{base}\nbase:\n{after}\n\nall:\n")
    assert [line for line in result.out.splitlines() if line in ("base:", "all:", "all2:", "all8:")] == [
        "base:",
        "all:",
        "all2:",
        "all8:",
        "base:",
        "all2:",
    ]
    assert result.out.endswith(f"\n{after}\n"), "the conversation is as it was"
    same = chat("/use all 0.5", "the fox", "/compare")
    first = answer("the fox", adapter="all", scale=0.5)
    assert same.out == f"{first}\nbase:\n{base}\n\nall:\n{first}\n\n"
    wrong = chat("/compare", "/compare @nosuch x", "/compare " + "dog " * 400, "the fox")
    assert wrong.out == said(base)
    for words in ("there is no question yet", "no adapter 'nosuch'", "do not fit the context"):
        assert words in wrong.err


def test_compare_gives_all_the_same_chance(chat: Chat) -> None:
    """With a scale of 0, an adapter is the base."""
    out = chat(
        "/use all 0", "/compare @all @all the fox", options=("--temperature", 5, "--max-tokens", 20)
    ).out
    base, of_all = out.removeprefix("base:\n").split("all:\n")
    assert base == of_all


def test_answers_stand_side_by_side(
    chat: Chat, answer: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk_module.stdout, "_force_terminal", True)
    monkeypatch.setattr(talk_module.stdout, "_width", 100)
    wide = chat("/compare @all the fox").out
    assert any("base" in line and "all" in line for line in wide.splitlines())
    monkeypatch.setattr(talk_module.stdout, "_width", 60)
    assert "base:\n" in chat("/compare @all the fox").out


def test_stats(chat: Chat) -> None:
    result = chat("/stats", "the fox", "so?", "/stats")
    assert "0 messages, 0 tokens with 0 B of keys and values\n" in result.err
    assert "4 messages, " in result.err and " tokens of the prompt were known, seed " in result.err
    assert result.err.count("memory: ") == 2 and ", of which foundation " in result.err


def test_quit_ends_in_between(chat: Chat, answer: Callable[..., str]) -> None:
    for quit in ("/quit", "/exit"):
        assert chat("the fox", quit, "the dog").out == said(answer("the fox"))


def test_nobody_types_so_there_is_no_prompt(chat: Chat) -> None:
    assert "base>" not in chat("the fox").err


def test_an_interrupt_ends_a_chat_where_nobody_types(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Session, *args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "events", interrupted)
    result = chat("the fox", "the dog")
    assert (result.code, result.out) == (130, "")


def test_a_wrong_option_ends_the_command(chat: Chat) -> None:
    failed(chat("x", options=("--top-p", 2)), "top_p is 2")
