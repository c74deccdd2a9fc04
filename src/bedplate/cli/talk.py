"""A conversation with branches: questions, answers, and what can be done with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from bedplate.bundle import files
from bedplate.cli.output import json_line, show_prefill, stderr, stdout
from bedplate.cli.requests import Answer, Defaults, Request, answered, as_options, checked, json_object, turns
from bedplate.errors import NameTakenError, NotFoundError, RunError
from bedplate.runtime.messages import Message, plain_messages

if TYPE_CHECKING:
    from bedplate.runtime.engine import Engine
    from bedplate.runtime.request import Event, Statistics
    from bedplate.runtime.session import Session

MAIN = "main"
_COLUMN = 36  # characters: answers stand side by side where each has so many


@dataclass
class Branch:
    """A conversation, up to its last answer."""

    session: Session
    messages: list[Message]


class Talk:
    """What fails changes nothing.

    generation: the options of `Session.events`, for all branches.
    """

    def __init__(
        self, engine: Engine, session: Session, generation: dict[str, Any], system: str | None
    ) -> None:
        self.engine = engine
        self.generation = checked(generation)
        self.name = MAIN
        self.branches = {MAIN: Branch(session, list(turns(system, None)))}

    @property
    def branch(self) -> Branch:
        return self.branches[self.name]

    @property
    def label(self) -> str:
        """What answers, and in which branch."""
        session = self.branch.session
        scale = "" if session.scale == 1 else f" × {session.scale:g}"
        branch = "" if self.name == MAIN else f" ({self.name})"
        return f"{session.adapter or 'base'}{scale}{branch}"

    def ask(self, messages: Sequence[Message]) -> None:
        """Answer the last of some messages. With the answer, they are the conversation then.

        KeyboardInterrupt: the answer counts as far as it came.
        """
        session, said = self.branch.session, list[str]()
        try:
            stream(session.events(messages, on_prefill=show_prefill, **self.generation), said)
        except KeyboardInterrupt:
            session.cancel()
            if said:
                self._keep(messages, said)
            raise
        self._keep(messages, said)
        print_speed(session.last)

    def _keep(self, messages: Sequence[Message], said: list[str]) -> None:
        self.branch.messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def with_question(self, text: str) -> list[Message]:
        return [*self.branch.messages, *turns(None, text)]

    def up_to_question(self) -> list[Message]:
        """The conversation up to its last question. RunError: there is none."""
        messages = self.branch.messages
        for count in range(len(messages), 0, -1):
            if messages[count - 1]["role"] == "user":
                return messages[:count]
        raise RunError("there is no question yet", hint="ask one first")

    def undo(self) -> str:
        """Forget the last question and what came after it. Returns it."""
        *before, question = self.up_to_question()
        self.branch.messages = before
        return str(question["content"])

    def set_system(self, text: str | None) -> None:
        messages = self.branch.messages
        has_one = bool(messages) and messages[0]["role"] == "system"
        self.branch.messages = [*turns(text, None), *messages[has_one:]]

    def reset(self) -> None:
        """Forget the conversation, but for the system message."""
        self.branch.messages = [one for one in self.branch.messages[:1] if one["role"] == "system"]
        self.branch.session.reset()

    def fork(self, name: str | None) -> None:
        """Go on in a branch of its own. NameTakenError: there is one of this name."""
        if name is None:
            name = next(
                name for name in map(str, range(1, len(self.branches) + 2)) if name not in self.branches
            )
        if name in self.branches:
            raise NameTakenError(f"there is a branch {name!r} already", hint=f"/branch {name} goes there")
        self.branches[name] = Branch(self.branch.session.fork(), list(self.branch.messages))
        self.name = name

    def switch(self, name: str) -> None:
        """Go on in another branch. NotFoundError: there is none of this name."""
        if name not in self.branches:
            raise NotFoundError(f"no branch {name!r}", hint=f"there are: {', '.join(self.branches)}")
        self.name = name

    def set(self, name: str, value: Any) -> None:
        """Change an option of a generation. RunError: it cannot be that."""
        self.generation = checked({**self.generation, **as_options({name: value})})

    def save(self, path: Path) -> None:
        """Write the conversation and its options. RunError: the file cannot be written."""
        session = self.branch.session
        fields = {"adapter": session.adapter, "scale": session.scale, "messages": self.branch.messages}
        try:
            with files.replacing(path) as file:
                file.write(json_line({**fields, **self.generation}).encode())
        except OSError as error:
            hint = "is there such a folder, and room on the disk?"
            raise RunError(f"it cannot be saved: {error.strerror}", where=path, hint=hint) from error

    def load(self, path: Path) -> None:
        """Go on with what `save` wrote. RunError: the file cannot be read, or is no conversation."""
        try:
            fields = json_object(path.read_bytes())
        except OSError as error:
            raise RunError(
                f"it cannot be read: {error.strerror}", where=path, hint="/save FILE writes one"
            ) from error
        fields.setdefault("messages", None)
        request = Defaults(generation=self.generation).request(fields)
        messages = plain_messages(fields["messages"]) if fields["messages"] else []
        generation = checked(request.generation)
        session = self.engine.session()
        session.use(request.adapter, scale=request.scale)
        self.branches[self.name] = Branch(session, [*messages])
        self.generation = generation

    def compare(self, adapters: Sequence[str | None], messages: Sequence[Message]) -> None:
        """Print what each adapter (None: the base) answers. The conversation stays as it is."""
        generation = dict(self.generation)
        if generation["seed"] is None:  # the same chance for all
            generation["seed"] = int.from_bytes(os.urandom(8))
        current = self.branch.session
        requests = [
            Request(
                prompt=messages,
                adapter=name,
                scale=current.scale if name == current.adapter else 1.0,
                generation=generation,
            )
            for name in adapters
        ]
        with stderr.status("comparing …"):
            answers = dict(answered(self.engine, requests, len(requests)))
        for answer in answers.values():
            if answer.error is not None:
                raise answer.error
        _print_beside({name or "base": answers[at] for at, name in enumerate(adapters)})


def stream(events: Iterator[Event], said: list[str]) -> None:
    """Print an answer while it is made. said: gets its pieces."""
    try:
        for event in events:
            said.append(event.text)
            sys.stdout.write(event.text)
            sys.stdout.flush()
    finally:
        if said:
            sys.stdout.write("\n")
            sys.stdout.flush()  # before the numbers on stderr


def print_speed(stats: Statistics | None) -> None:
    assert stats is not None, "a generation has just ended"
    decoded = max(stats.generated_tokens - 1, 0)
    speed = f"{decoded / stats.decode_seconds:.0f} tokens/s" if stats.decode_seconds > 0 and decoded else "–"
    stderr.print(
        f"[dim]{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, "
        f"{stats.generated_tokens} generated, {speed}, ended by {stats.finish_reason}[/]"
    )


def _print_beside(answers: dict[str, Answer]) -> None:
    """In columns where a terminal has room for them, one below the other elsewhere."""
    if not stdout.is_terminal or stdout.width < len(answers) * _COLUMN:
        for name, answer in answers.items():
            sys.stdout.write(f"{name}:\n{answer.text}\n\n")
        sys.stdout.flush()
        return
    table = Table(box=None, padding=(0, 3, 0, 0), show_edge=False)
    for name in answers:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(answer.text) for answer in answers.values()))
    stdout.print(table, soft_wrap=False)
