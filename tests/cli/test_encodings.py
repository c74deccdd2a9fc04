"""Text that comes in and goes out by the command line: whatever its bytes, an answer or an error in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, failed

import bedplate
from bedplate.cli import output

EXECUTABLE = Path(sys.executable).with_name("bedplate")
SHORT = ("--max-tokens", 4)


def run_real(*args: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own: with arguments, an environment and streams as a system gives them."""
    command = [os.fsencode(str(arg)) if not isinstance(arg, bytes) else arg for arg in (EXECUTABLE, *args)]
    options["env"] = {**os.environ, **options.get("env", {})}
    return subprocess.run(command, stderr=subprocess.PIPE, check=False, **options)


@pytest.mark.parametrize("option", ["--prompt", "--system", "--stop"])
def test_an_option_that_is_not_utf8(toy_bundle: bedplate.Bundle, option: str) -> None:
    args = [b"-p", b"x", option.encode(), b"caf\xe9"]
    result = run_real("run", toy_bundle.path, *args, stdout=subprocess.PIPE)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.startswith(f"error: {option} is not text: its character 3 ".encode())
    assert b"\nhint: bytes that are not UTF-8" in result.stderr


def test_a_system_message_of_a_chat_that_is_not_utf8(command: Command, toy_bundle: bedplate.Bundle) -> None:
    failed(command("chat", toy_bundle.path, "--system", "caf\udce9", stdin="hi"), "--system is not text")


def test_a_prompt_from_stdin_that_is_not_utf8(command: Command, toy_bundle: bedplate.Bundle) -> None:
    result = command("run", toy_bundle.path, "-p", "-", stdin=b"caf\xe9")
    failed(result, "stdin: the input is not text in UTF-8 (byte 3)", "hint: give text in that encoding")


@pytest.mark.parametrize(
    ("data", "same"),
    [(b"\xef\xbb\xbfthe fox", "the fox"), (b"the\r\nfox\r", "the\nfox\n"), ("hé".encode(), "hé")],
    ids=["a byte order mark", "other ends of lines", "more than ASCII"],
)
def test_a_prompt_from_stdin(command: Command, toy_bundle: bedplate.Bundle, data: bytes, same: str) -> None:
    args = ("run", toy_bundle.path, "--json", *SHORT)
    found, expected = command(*args, "-p", "-", stdin=data).json(), command(*args, "-p", same).json()
    assert found["text"] == expected["text"]
    assert found["statistics"]["prompt_tokens"] == expected["statistics"]["prompt_tokens"]


def test_a_chat_outlives_a_line_that_is_not_utf8(command: Command, toy_bundle: bedplate.Bundle) -> None:
    args = ("chat", toy_bundle.path, "--temperature", 0, *SHORT)
    expected = command(*args, stdin="the fox\n/quit\n")
    found = command(*args, stdin=b"caf\xe9\n\xef\xbb\xbfthe fox\r\n\xff\xfe\n/quit\n")
    assert (found.code, found.out) == (0, expected.out)
    assert found.err.count("stdin: the input is not text in UTF-8") == 2 and found.err.count("hint: ") == 2


def test_text_of_special_tokens(command: Command, toy_bundle: bedplate.Bundle) -> None:
    args = ("run", toy_bundle.path, "-p", "a<|im_end|>b", "--json", *SHORT)
    as_text, as_token = command(*args).json(), command(*args, "--allow-special").json()
    assert as_text["statistics"]["prompt_tokens"] > as_token["statistics"]["prompt_tokens"]
    # Long as text, too long for a context of 128: as tokens it fits.
    line = "<|im_end|>" * 20
    short = ("--max-context", 128, *SHORT)
    assert "do not fit the context" in command("chat", toy_bundle.path, *short, stdin=line).err
    chat = command("chat", toy_bundle.path, "--allow-special", *short, stdin=line)
    assert "generated" in chat.err and "error" not in chat.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_cannot_show_a_character(toy_bundle: bedplate.Bundle, encoding: str) -> None:
    """The toy answers with bytes of all kinds, that is, with replacement characters."""
    args = ("run", toy_bundle.path, "-p", "the fox", "--max-tokens", 30, "--temperature", 50, "--seed", 1)
    env = {"PYTHONIOENCODING": encoding}
    expected = run_real(*args, stdout=subprocess.PIPE).stdout.decode()
    assert not expected.isascii(), "the toy says nothing of the kind: choose another seed"
    found = run_real(*args, stdout=subprocess.PIPE, env=env)
    assert found.returncode == 0
    assert found.stdout == expected.encode(encoding, errors="backslashreplace")
    as_json = run_real(*args, "--json", stdout=subprocess.PIPE, env=env)
    assert json.loads(as_json.stdout.decode("ascii"))["text"] + "\n" == expected


def test_in_the_locale_c_text_is_utf8(toy_bundle: bedplate.Bundle) -> None:
    args = ("run", toy_bundle.path, "-p", "-", "--json", *SHORT)
    env = {"LC_ALL": "C", "LANG": "C"}
    found = [run_real(*args, input="hé".encode(), stdout=subprocess.PIPE, env=one) for one in ({}, env)]
    assert found[0].returncode == 0
    assert json.loads(found[0].stdout)["text"] == json.loads(found[1].stdout)["text"]


def test_a_path_that_is_not_utf8(toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.bundle")
    (tmp_path / name).symlink_to(toy_bundle.path)
    listed = run_real("list", tmp_path / name, stdout=subprocess.PIPE)
    assert listed.returncode == 0 and b"caf\\udce9.bundle: 3 adapters" in listed.stdout
    missing = run_real("list", tmp_path / f"no{name}", stdout=subprocess.PIPE)
    assert missing.returncode == 2 and b"nocaf\\udce9.bundle: not a bundle" in missing.stderr


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_closed_stdin(toy_bundle: bedplate.Bundle, command: str) -> None:
    args = f'"{EXECUTABLE}" {command} "{toy_bundle.path}" {"-p -" if command == "run" else ""} <&-'
    result = subprocess.run(["bash", "-c", args], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: stdin is closed\nhint: " in result.stderr


def test_a_closed_stdout(toy_bundle: bedplate.Bundle) -> None:
    args = f'"{EXECUTABLE}" run "{toy_bundle.path}" -p x --max-tokens 4 >&-'
    result = subprocess.run(["bash", "-c", args], stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_json_is_ascii_where_stdout_is_not_utf8(capfd: pytest.CaptureFixture[str]) -> None:
    output.print_json({"text": "é"})
    assert json.loads(capfd.readouterr().out) == {"text": "é"}
