"""Prompts as JSON objects, and their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from bedplate.cli.options import GENERATION
from bedplate.errors import BedplateError, RunError
from bedplate.runtime import arguments
from bedplate.runtime.messages import Conversation
from bedplate.runtime.request import Wish

if TYPE_CHECKING:
    from bedplate.runtime.engine import Engine
    from bedplate.runtime.request import Event
    from bedplate.runtime.session import Prompt, Session

FIELDS = ("id", "prompt", "messages", "adapter", "scale", *GENERATION)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it. adapter, scale: as `Session.use` takes them.  generation: the options of
    `Session.events`.
    """

    prompt: Prompt
    adapter: str | Mapping[str, float] | None
    scale: float
    generation: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds where an object does not say it. raw: a text is the prompt as it is, not a user's turn."""

    adapter: str | None = None
    scale: float = 1.0
    system: str | None = None
    raw: bool = False
    generation: dict[str, Any]

    def request(self, fields: dict[str, Any]) -> Request:
        """The request of an object. RunError: it has other fields, or none that is a prompt."""
        if unknown := [name for name in fields if name not in FIELDS]:
            raise RunError(f"unknown field {arguments.shown(unknown[0])}", hint=f"known: {', '.join(FIELDS)}")
        if ("prompt" in fields) == ("messages" in fields):
            raise RunError("it needs one prompt", hint='give "prompt" or "messages", and not both')
        generation = {name: value for name, value in fields.items() if name in GENERATION}
        return Request(
            prompt=self._prompt(fields),
            adapter=fields.get("adapter", self.adapter),
            # The scale of the command is one of the command's adapter.
            scale=fields.get("scale", 1.0 if "adapter" in fields else self.scale),
            generation={**self.generation, **as_options(generation)},
        )

    def _prompt(self, fields: dict[str, Any]) -> Prompt:
        if "prompt" not in fields:
            hint = 'give a list of messages: [{"role": "user", "content": "…"}]'
            messages = arguments.instance("messages", fields["messages"], list, hint)
            has_system = (
                bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
            )
            return Conversation(messages if has_system else [*turns(self.system, None), *messages])
        text = arguments.text("prompt", fields["prompt"])
        return text if self.raw else turns(self.system, text)


def turns(system: str | None, user: str | None) -> list[dict[str, Any]]:
    """The messages of a conversation that begins."""
    roles = (("system", system), ("user", user))
    return [{"role": role, "content": text} for role, text in roles if text is not None]


def as_options(fields: dict[str, Any]) -> dict[str, Any]:
    """Options of a generation from JSON, which names tokens by text, and may have one stop string for a list."""
    options = dict(fields)
    if isinstance(stop := options.get("stop"), str):
        options["stop"] = (stop,)
    if isinstance(bias := options.get("logit_bias"), dict):
        options["logit_bias"] = {_token(name): more for name, more in bias.items()}
    return options


def checked(generation: dict[str, Any]) -> dict[str, Any]:
    """The same options. RunError: one has a wrong type or value."""
    options = dict(generation)
    arguments.flag("allow_special", options.pop("allow_special"))
    Wish.of(**options)
    return generation


def _token(name: Any) -> int:
    token = arguments.token_of(name)
    if token is None:
        raise RunError(f"logit_bias has {arguments.shown(name)}", hint='name tokens by ids: {"15": 2.5}')
    return token


def json_object(data: bytes) -> dict[str, Any]:
    """RunError: it is not a JSON object in UTF-8."""
    hint = 'write a JSON object: {"prompt": "…"}'
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # those of UTF-8 are ValueErrors too
        raise RunError(f"not JSON: {error}", hint=hint) from None
    return arguments.instance("the value", value, dict, hint)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


@dataclass
class Answer:
    """What a request has come to. session: None if it was refused. error: why there is no answer."""

    request: Request | BedplateError
    text: str = ""
    session: Session | None = None
    error: BedplateError | None = None
    _events: Iterator[Event] = field(default_factory=lambda: iter(()))

    def start(self, engine: Engine) -> None:
        try:
            if isinstance(self.request, BedplateError):
                raise self.request
            self.session = engine.session()
            self.session.use(self.request.adapter, scale=self.request.scale)
            self._events = self.session.events(self.request.prompt, **self.request.generation)
        except BedplateError as error:
            self.error = error

    def advance(self) -> bool:
        """Take the next event, if there is one. Returns whether there may be more."""
        try:
            event = None if self.error else next(self._events, None)
        except BedplateError as error:
            self.error = error
            return False
        if event is None:
            return False
        self.text += event.text
        return event.finish_reason is None


def answered(
    engine: Engine,
    requests: Iterable[Request | BedplateError],
    parallel: int,
    *,
    is_there: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, Answer]]:
    """Answer requests, so many at a time, in one thread: the engine steps all that are open together. Yields each
    answer with the place of its request, as soon as it is there.

    is_there: whether the next request, or their end, is. While it is not, those that are open go on.
    """
    waiting = enumerate(requests)
    active: list[tuple[int, Answer]] = []
    try:
        while True:
            while len(active) < parallel and (not active or is_there()):
                following = next(waiting, None)
                if following is None:
                    break
                at, request = following
                active.append((at, Answer(request)))
                active[-1][1].start(engine)
            if not active:
                return
            going = [answer.advance() for _, answer in active]
            yield from (one for one, goes in zip(active, going, strict=True) if not goes)
            active = [one for one, goes in zip(active, going, strict=True) if goes]
    finally:
        for _, answer in active:  # an interrupt leaves some
            if answer.session is not None:
                answer.session.cancel()
