"""What can be typed in a chat: questions, and the commands of one table."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape

from bedplate.cli.lines import Lines
from bedplate.cli.options import GENERATION
from bedplate.cli.output import print_error, size, stderr
from bedplate.cli.talk import Talk, print_speed
from bedplate.errors import BedplateError, NotFoundError, RunError

_BLOCK = '"""'


class Command(NamedTuple):
    """names: the first is the usual one.  takes: what may follow it.

    do: gets the talk and what follows. EOFError: the chat ends.
    """

    names: tuple[str, ...]
    takes: str
    help: str
    do: Callable[[Talk, str], None]


def talk_until_end(talk: Talk, lines: Lines) -> None:
    """Do what is typed until the input ends. Errors are printed, and the talk goes on.

    KeyboardInterrupt: Ctrl-C on an empty line, or where nobody types.
    """
    lines.complete = lambda text: _completions(talk, text)
    if lines.interactive:
        stderr.print("[dim]/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat.[/]")
    while True:
        try:
            text = _read(lines, f"{talk.label}>")
            if text.strip():
                lines.remember(text)
                _do(talk, lines, text)
        except EOFError:
            return
        except BedplateError as error:
            print_error(error)


def _read(lines: Lines, prompt: str) -> str:
    r"""The next text: a line, or lines from \"\"\" to \"\"\"."""
    text = lines.read(prompt)
    if text.startswith(_BLOCK):
        while text == _BLOCK or not text.rstrip().endswith(_BLOCK):
            try:
                text += "\n" + lines.read("...")
            except EOFError:
                what = f"a text that begins with {_BLOCK} has no end"
                raise RunError(what, hint=f"end it with {_BLOCK}") from None
            except KeyboardInterrupt:
                if not lines.interactive:
                    raise
                return ""
    return text


def _do(talk: Talk, lines: Lines, text: str) -> None:
    try:
        if text.startswith("/"):
            name, _, argument = text.partition(" ")
            _command(name.strip()).do(talk, argument.strip())
        elif text.startswith(_BLOCK):
            talk.ask(talk.with_question(text.strip().removeprefix(_BLOCK).removesuffix(_BLOCK).strip("\n")))
        else:
            talk.ask(talk.with_question(text))
    except KeyboardInterrupt:
        if not lines.interactive:
            raise
        stderr.print("[dim]stopped[/]")


def _command(name: str) -> Command:
    """NotFoundError: there is no such command."""
    known = {one: command for command in COMMANDS for one in command.names}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"do you mean {near[0]}? " if near else "/help lists the commands. "
        raise NotFoundError(f"no command {name}", hint=f"{hint}A question may begin with a space and a /")
    return known[name]


def _completions(talk: Talk, text: str) -> list[str]:
    """What the last word of a line can become."""
    name, space, _ = text.partition(" ")
    word = text.rpartition(" ")[2]
    if not text.startswith("/"):
        return []
    if not space:
        words = [one for command in COMMANDS for one in command.names]
    elif name in ("/adapter", "/use"):
        words = list(talk.engine.bundle.adapters)
    elif name == "/compare":
        words = [f"@{one}" for one in talk.engine.bundle.adapters]
    else:
        words = {"/branch": list(talk.branches), "/set": list(GENERATION)}.get(name, [])
    return [f"{one} " for one in words if one.startswith(word)]


def _use(talk: Talk, argument: str) -> None:
    name, _, scale = argument.partition(" ")
    try:
        factor = float(scale or 1)
    except ValueError:
        raise RunError(f"the scale is {scale}", hint="write /adapter NAME 0.5") from None
    talk.branch.session.use(None if name in ("", "base") else name, scale=factor)


def _adapters(talk: Talk, argument: str) -> None:
    loaded = talk.engine.memory().adapters
    for entry in talk.engine.bundle.adapters.values():
        mark = "*" if entry.name == talk.branch.session.adapter else " "
        state = "loaded" if entry.name in loaded else ""
        _say(f"{mark} {entry.name}  rank {entry.info.rank}, {size(entry.nbytes)}  {state}")


def _fork(talk: Talk, argument: str) -> None:
    talk.fork(argument or None)


def _branch(talk: Talk, argument: str) -> None:
    if argument:
        talk.switch(argument)
        return
    for name, branch in talk.branches.items():
        mark = "*" if name == talk.name else " "
        questions = [one for one in branch.messages if one["role"] == "user"]
        last = f", the last: {_short(questions[-1]['content'])}" if questions else ""
        _say(f"{mark} {name}  {branch.session.adapter or 'base'}, {len(questions)} questions{last}")


def _compare(talk: Talk, argument: str) -> None:
    names = list[str]()
    while argument.startswith("@"):
        name, _, argument = argument.partition(" ")
        names.append(name[1:])
        argument = argument.strip()
    current, bundle = talk.branch.session.adapter, talk.engine.bundle
    for name in names:
        talk.engine.check_adapter(name)
    others = names or ([current] if current else list(bundle.adapters))
    messages = talk.with_question(argument) if argument else talk.up_to_question()
    talk.compare([None, *dict.fromkeys(others)], messages)


def _retry(talk: Talk, argument: str) -> None:
    talk.ask(talk.up_to_question())


def _undo(talk: Talk, argument: str) -> None:
    _say(f"forgotten: {_short(talk.undo())}")


def _system(talk: Talk, argument: str) -> None:
    talk.set_system(argument or None)


def _set(talk: Talk, argument: str) -> None:
    name, _, text = argument.partition(" ")
    name = name.replace("-", "_")
    if not name:
        for option, value in talk.generation.items():
            _say(f"{option}  {value}")
        return
    if name not in GENERATION:
        near = difflib.get_close_matches(name, GENERATION, n=1)
        hint = f"do you mean {near[0]}?" if near else "/set without a name lists them"
        raise NotFoundError(f"no option {name}", hint=hint)
    try:
        value = json.loads(text)
    except ValueError:
        value = None if text in ("", "none", "random") else text
    talk.set(name, value)


def _save(talk: Talk, argument: str) -> None:
    talk.save(_path(argument))


def _load(talk: Talk, argument: str) -> None:
    talk.load(_path(argument))


def _path(argument: str) -> Path:
    if not argument:
        raise RunError("there is no file", hint="name one: /save talk.json, /load talk.json")
    return Path(argument).expanduser()


def _stats(talk: Talk, argument: str) -> None:
    session, memory = talk.branch.session, talk.engine.memory()
    held = f"{len(session.tokens)} tokens with {size(session.kv_bytes)} of keys and values"
    _say(f"{len(talk.branch.messages)} messages, {held}")
    if session.last is not None:
        print_speed(session.last)
        _say(f"{session.last.reused_tokens} tokens of the prompt were known, seed {session.last.seed}")
    adapters = sum(memory.adapters.values())
    _say(
        f"memory: {size(memory.process)}, of which foundation {size(memory.foundation)}, adapters {size(adapters)}, "
        f"keys and values {size(memory.kv)}, cache {size(memory.cache)}"
    )


def _reset(talk: Talk, argument: str) -> None:
    talk.reset()


def _help(talk: Talk, argument: str) -> None:
    calls = {f"{', '.join(one.names)} {one.takes}".strip(): one.help for one in COMMANDS}
    width = max(map(len, calls))
    for call, text in calls.items():
        _say(f"{call.ljust(width)}  {text}")
    _say(f"Lines from {_BLOCK} to {_BLOCK} are one question. Tab completes names.")


def _quit(talk: Talk, argument: str) -> None:
    raise EOFError


def _say(text: str) -> None:
    stderr.print(escape(text))


def _short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 60 else line[:59] + "…"


COMMANDS = (
    Command(
        ("/adapter", "/use"), "[NAME [SCALE]]", "go on with an adapter, without a name with the base", _use
    ),
    Command(("/adapters",), "", "list the adapters", _adapters),
    Command(("/compare",), "[@NAME ...] [QUESTION]", "answer with base and adapters, side by side", _compare),
    Command(("/fork",), "[NAME]", "go on in another branch of this conversation", _fork),
    Command(("/branch",), "[NAME]", "go to a branch, without a name list them", _branch),
    Command(("/retry",), "", "answer the last question again", _retry),
    Command(("/undo",), "", "forget the last question and its answer", _undo),
    Command(("/system",), "[TEXT]", "set the system message, or take it away", _system),
    Command(("/set",), "[NAME VALUE]", "set an option such as temperature, or list them", _set),
    Command(("/save",), "FILE", "write the conversation to a file", _save),
    Command(("/load",), "FILE", "go on with a conversation from a file", _load),
    Command(("/stats",), "", "show tokens, speed and memory", _stats),
    Command(("/reset",), "", "forget the conversation", _reset),
    Command(("/help",), "", "list the commands", _help),
    Command(("/quit", "/exit"), "", "end the chat", _quit),
)
