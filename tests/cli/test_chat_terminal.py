"""A chat in a terminal: editing, the history, and Ctrl-C."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal

import bedplate

CTRL_C, CTRL_D, CTRL_A, UP, TAB = "\x03", "\x04", "\x01", "\x1b[A", "\t"

Open = Callable[..., Terminal]


@pytest.fixture
def terminal(toy_bundle: bedplate.Bundle, tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def open_terminal(*options: object) -> Terminal:
        fixed = ("--temperature", 0, "--max-tokens", 4, "--no-check")
        args = ["chat", str(toy_bundle.path), *map(str, (*fixed, *options))]
        opened.append(Terminal(args, XDG_STATE_HOME=str(tmp_path / "state"), INPUTRC=os.devnull))
        opened[-1].until("base>")
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_a_line_is_edited(terminal: Open, toy_bundle: bedplate.Bundle) -> None:
    chat = terminal()
    chat.type("fox\x01the \n")  # Ctrl-A goes to the beginning
    with bedplate.Engine(toy_bundle) as engine:
        expected = engine.session().generate([{"role": "user", "content": "the fox"}], max_tokens=4)
    assert expected.split()[0] in chat.until("ended by length")
    chat.until("base>")
    chat.type(f"/ada{TAB}")
    chat.until("/adapter")
    chat.type("s\n")
    chat.until("all8  rank 4")
    chat.type(f"/use al{TAB}2\n")
    chat.until("all2>")
    chat.type(CTRL_D)
    assert chat.end() == 0 and "rror" not in chat.rest


def test_pasted_lines_are_one_question(terminal: Open, tmp_path: Path) -> None:
    chat = terminal()
    chat.type("\x1b[200~the fox\nthe dog\x1b[201~\n")
    chat.until("ended by length")
    chat.until("base>")
    chat.type(f"/save {tmp_path / 'talk.json'}\n/quit\n")
    assert chat.end() == 0
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "the fox\nthe dog"


def test_ctrl_c_stops_an_answer_and_then_the_chat(terminal: Open, tmp_path: Path) -> None:
    chat = terminal("--max-tokens", 200, "--ignore-eos")
    chat.type("the fox\n")
    chat.until("the fox\n")
    time.sleep(0.6)  # some tokens
    chat.type(CTRL_C)
    chat.until("stopped")
    chat.until("base>")
    chat.type(f"/save {tmp_path / 'talk.json'}\n")
    chat.until("base>")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] and messages[1]["content"]
    assert len(messages[1]["content"]) < 100, "it would have some hundred characters"
    chat.type("/compare @all so?\n")
    chat.until("comparing")
    time.sleep(0.3)
    chat.type(CTRL_C)
    chat.until("stopped")
    chat.until("base>")
    chat.type("half a line")
    chat.until("half a line")
    chat.until("base>", asking=CTRL_C)
    chat.type("/set max_tokens 2\n")
    chat.until("base>")
    chat.type("so?\n")
    chat.until("2 generated")
    chat.until("base>")
    assert chat.end(asking=CTRL_C) == 130


def test_ctrl_c_drops_a_text_of_several_lines(terminal: Open) -> None:
    chat = terminal()
    chat.type('"""the fox\n')
    chat.until("...")
    chat.until("base>", asking=CTRL_C)
    chat.type("/stats\n")
    chat.until("0 messages")
    chat.type("/quit\n")
    assert chat.end() == 0


def test_the_history_is_there_in_the_next_chat(terminal: Open, tmp_path: Path) -> None:
    chat = terminal()
    chat.type('"""the fox\njumps"""\n')
    chat.until("ended by length")
    chat.until("base>")
    chat.type("/stats\n/quit\n")
    assert chat.end() == 0
    file = tmp_path / "state" / "bedplate" / "chat_history"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        '"""the fox\njumps"""',
        "/stats",
        "/quit",
    ]
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    file.chmod(0o644)
    again = terminal()
    assert file.stat().st_mode & 0o777 == 0o600
    again.type(UP * 2 + "\n")
    again.until("0 messages")
    again.until("base>")
    again.type(CTRL_D)
    assert again.end() == 0


def test_no_history(terminal: Open, tmp_path: Path) -> None:
    chat = terminal("--no-history")
    chat.type("/stats\n/quit\n")
    assert chat.end() == 0 and not (tmp_path / "state").exists()


def test_a_history_that_cannot_be_kept_is_a_note(terminal: Open, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    chat = terminal()
    chat.type("/stats\n")
    chat.until("0 messages")
    chat.until("base>")
    chat.type(CTRL_D)
    assert chat.end() == 0


def test_a_long_history_becomes_shorter_and_a_damaged_one_is_read(terminal: Open, tmp_path: Path) -> None:
    file = tmp_path / "state" / "bedplate" / "chat_history"
    file.parent.mkdir(parents=True)
    file.write_bytes(b'"old"\n' * 2000 + b"{\n\xff\n5\n" + b'"\\ud800"\n"\\u0000"\n"/stats"\n')
    chat = terminal()
    assert len(file.read_bytes().splitlines()) == 1000
    chat.type(UP + "\n")
    chat.until("0 messages")
    chat.until("base>")
    chat.type(CTRL_D)
    assert chat.end() == 0
