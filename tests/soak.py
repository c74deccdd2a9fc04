"""Random operations of many threads on one engine, and the same requests made alone.

    python tests/soak.py BUNDLE REQUESTS ANSWERS

This computes requests (JSON) one by one, each in a session of its own, with one thread and no cache. The bundle has an
adapter for each version. It imports nothing but what runs bundles.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bedplate import Bundle, Engine, Session
from bedplate.errors import RunError

SCALES = (1.0, 1.0, 0.5, -1.0)
MOST_SESSIONS = 24
LONGEST = 200  # tokens of a prompt
WEIGHTS = {
    "generate": 12,
    "follow_up": 6,
    "cancel": 3,
    "abandon": 2,
    "fork": 3,
    "use": 2,
    "scale": 2,
    "unload": 2,
    "replace": 1,
    "save_and_load": 2,
    "forget": 2,
    "ask_memory": 2,
}


class Request(NamedTuple):
    """version: which content of an adapter answers. None: the base."""

    version: str | None
    scale: float
    prompt: tuple[int, ...]
    max_tokens: int
    options: tuple[tuple[str, Any], ...]


class Answer(NamedTuple):
    """finish: why it ended. None: it goes on."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str | None = None

    @classmethod
    def of(cls, parts: Any) -> Answer:
        """From JSON, which has lists in place of tuples."""
        text, tokens, logprobs, finish = parts
        return cls(text, tuple(tokens), tuple(logprobs), finish)

    @property
    def is_whole(self) -> bool:
        return self.finish in ("stop", "length")

    def begins(self, whole: Answer) -> bool:
        count = len(self.tokens)
        return (
            whole.text.startswith(self.text.rstrip("\ufffd"))  # where a character was cut
            and whole.tokens[:count] == self.tokens
            and whole.logprobs[:count] == self.logprobs
        )


def answers(session: Session, request: Request) -> Iterator[Answer]:
    """How far the answer is after each event."""
    answer, options = Answer(), dict[str, Any](request.options)
    for event in session.events(list(request.prompt), max_tokens=request.max_tokens, logprobs=0, **options):
        assert event.logprobs is not None
        answer = Answer(
            answer.text + event.text,
            (*answer.tokens, *event.tokens),
            (*answer.logprobs, *(one.logprob for one in event.logprobs)),
            event.finish_reason,
        )
        yield answer


def alone(bundle: Path, requests: list[Request]) -> list[Answer]:
    engine = Engine(Bundle.open(bundle), threads=1, cache_bytes=0)
    found = []
    for request in requests:
        session = engine.session()
        session.use(request.version, scale=request.scale)
        *_, last = answers(session, request)
        found.append(last)
    return found


class Told(NamedTuple):
    """An answer, or the beginning of one that something else ended."""

    request: Request
    answer: Answer

    def agrees(self, whole: Answer) -> bool:
        return self.answer == whole if self.answer.is_whole else self.answer.begins(whole)


@dataclass
class Place:
    """A session that any thread may use. lock: what it uses and what is asked for go together."""

    session: Session
    lock: threading.Lock = field(default_factory=threading.Lock)


class World:
    """What all threads share.

    versions: of each adapter, the one that the bundle has now.  replace: puts a version in the place of an adapter.
    """

    def __init__(
        self, engine: Engine, versions: dict[str, str], replace: Callable[[str], str], folder: Path
    ) -> None:
        self.engine, self.versions, self._replace, self.folder = engine, versions, replace, folder
        self.places = [Place(engine.session()) for _ in range(8)]
        self.told: list[Told] = []
        self.counts: Counter[str] = Counter()
        # Whoever replaces an adapter takes its lock, and so does whoever must know which version it has.
        self._names = {name: threading.Lock() for name in versions}

    @contextmanager
    def settled(self, name: str | None) -> Iterator[str | None]:
        """Nobody replaces the adapter meanwhile. Gives its version."""
        if name is None:
            yield None
            return
        with self._names[name]:
            yield self.versions[name]

    def replace(self, name: str) -> None:
        with self._names[name]:
            self.versions[name] = self._replace(name)

    def run(self, threads: int, operations: int, seed: int) -> None:
        """So many operations, in all. Raises the first error: others can follow from it."""
        with ThreadPoolExecutor(threads) as pool:
            users = [User(self, f"{seed} {number}") for number in range(threads)]
            acts = [pool.submit(user.act, operations // threads) for user in users]
            for done in as_completed(acts):
                done.result()

    def forget(self) -> None:
        """All sessions and all that is loaded."""
        self.places = [Place(self.engine.session()) for _ in range(8)]
        self.engine.unload()


class User:
    def __init__(self, world: World, seed: str) -> None:
        self.world, self.engine, self.drawn, self.seed = world, world.engine, random.Random(seed), seed
        self.begun = 0

    def act(self, operations: int) -> None:
        for _ in range(operations):
            (name,) = self.drawn.choices([*WEIGHTS], [*WEIGHTS.values()])
            try:
                getattr(self, name)(self.drawn.choice(self.world.places))
            except RunError as error:
                if "memory is full" not in str(error):
                    raise
                name = "refused"
            self.world.counts[name] += 1

    def generate(self, place: Place) -> None:
        """Ask any adapter something."""
        first = self.drawn.randrange(3)  # of few texts, so that many begin alike
        prompt = [
            (first + 3 * number) % 300 + 2
            for number in range(self.drawn.choice([3, 40, 64, 65, 130, LONGEST]))
        ]
        self._ask(place, self._any_adapter(), self._any_scale(), lambda: prompt)

    def follow_up(self, place: Place) -> None:
        """Go on with what the session holds."""
        more = [self.drawn.randrange(2, 300) for _ in range(self.drawn.choice([1, 20]))]
        session = place.session
        self._ask(
            place, session.adapter, session.scale, lambda: [*session.tokens[: LONGEST - len(more)], *more]
        )

    def abandon(self, place: Place) -> None:
        """Do not listen to the end."""
        self._ask(place, self._any_adapter(), 1.0, lambda: [7, 8, 9], listen=self.drawn.randrange(3))

    def cancel(self, place: Place) -> None:
        place.session.cancel()

    def fork(self, place: Place) -> None:
        self._add(place.session.fork())

    def use(self, place: Place) -> None:
        self._use(place, self._any_adapter(), self._any_scale())

    def scale(self, place: Place) -> None:
        self._use(place, place.session.adapter, self._any_scale())

    def unload(self, _: Place) -> None:
        self.engine.unload(self._any_adapter())

    def replace(self, _: Place) -> None:
        self.world.replace(self.drawn.choice([*self.world.versions]))

    def save_and_load(self, place: Place) -> None:
        path = self.world.folder / f"{self.seed}.session"
        with place.lock, self.world.settled(place.session.adapter):
            place.session.save(path)
            self._add(self.engine.load_session(path))

    def forget(self, _: Place) -> None:
        if len(self.world.places) > 4:
            self.world.places.pop(0)

    def ask_memory(self, _: Place) -> None:
        memory = self.engine.memory()
        assert memory.kv >= 0 and memory.cache >= 0

    def _add(self, session: Session) -> None:
        self.world.places.append(Place(session))
        if len(self.world.places) > MOST_SESSIONS:
            self.world.places.pop(0)

    def _any_adapter(self) -> str | None:
        return self.drawn.choice([None, *self.world.versions])

    def _any_scale(self) -> float:
        return self.drawn.choice(SCALES)

    def _use(self, place: Place, name: str | None, scale: float) -> None:
        with place.lock, self.world.settled(name):
            place.session.use(name, scale=1.0 if name is None else scale)

    def _options(self) -> tuple[tuple[str, Any], ...]:
        if self.drawn.random() < 0.4:
            return ()
        drawn = {"temperature": 20.0, "seed": self.drawn.randrange(3), "ignore_eos": True}
        if self.drawn.random() < 0.5:
            drawn |= {"top_p": 0.9, "repetition_penalty": 1.3}
        return tuple(drawn.items())

    def _ask(
        self,
        place: Place,
        name: str | None,
        scale: float,
        prompt: Callable[[], list[int]],
        *,
        listen: int | None = None,
    ) -> None:
        """Whoever asks the same session meanwhile, or cancels it, ends the answer.

        listen: to so many events after the first. None: to all.
        """
        session, answer = place.session, Answer()
        with ExitStack() as begins:
            begins.enter_context(place.lock)
            version = begins.enter_context(self.world.settled(name))
            session.use(name, scale=1.0 if name is None else scale)
            asked = Request(
                version, session.scale, tuple(prompt()), self.drawn.choice([1, 8, 24]), self._options()
            )
            pieces = answers(session, asked)
            try:
                for count, answer in enumerate(pieces):  # noqa: B007
                    begins.close()  # so it has begun
                    if count == listen:
                        break
            finally:
                pieces.close()  # type: ignore[attr-defined]
                self.world.told.append(Told(asked, answer))


def main() -> None:
    bundle, requests, found = map(Path, sys.argv[1:])
    asked = [Request(*parts) for parts in json.loads(requests.read_text())]
    found.write_text(json.dumps(alone(bundle, asked)))


if __name__ == "__main__":
    main()
