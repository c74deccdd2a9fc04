"""The models that a server has: bundles, their bases and their adapters."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bedplate.bundle.entries import AdapterEntry
from bedplate.errors import NameTakenError
from bedplate.runtime.engine import Engine
from bedplate.runtime.fixed import Fixed
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.errors import ApiError, about, unknown_model
from bedplate.serve.room import Room
from bedplate.serve.watch import Watch
from bedplate.serve.wire import Lora

Json = dict[str, Any]


class Origin(NamedTuple):
    """Where a loaded adapter came from, and when."""

    root: str
    created: int


@dataclass(frozen=True, eq=False)
class Base:
    """A bundle that is served. name: of its base.  watch: is told of its requests.  origins: of the adapters that were
    loaded while it is served.  room: where requests wait for memory.
    """

    name: str
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))
    watch: Watch = field(default_factory=Watch)
    origins: dict[str, Origin] = field(default_factory=dict)
    room: Room = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", Room(self.engine))

    def load(self) -> None:
        """Load the foundation and the tokenizer. It takes seconds."""
        self.engine.tokenizer.open()
        self.engine.load()


@dataclass(frozen=True)
class Model:
    """What answers a request. id: as it was asked for.  fixed: adapters as they are when the request begins; none: the
    base.  since: when it was asked for, a time of `time.perf_counter`.
    """

    id: str
    base: Base
    fixed: Fixed
    since: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def key(self) -> str:
        """The same for all names of it. Fair shares are counted for it."""
        return ":".join([self.base.name, *sorted(self.adapters)])

    @property
    def adapters(self) -> dict[str, float]:
        """By name, each with its scale."""
        return self.fixed.adapters

    def vocab_for(self, tokens: Iterable[int]) -> int:
        """How many tokens it knows. An adapter can have more than the base. Its file is read for that only if one of
        these tokens is not the base's.
        """
        base, known = self.base.engine.limits.vocab, self.base.engine.bundle.adapters
        if max(tokens, default=0) < base:
            return base
        return max([base, *(known[name].read_info().vocab for name in self.adapters if name in known)])

    @property
    def tokenizer(self) -> Tokenizer:
        """Of its one adapter, else of the base."""
        return self.fixed.tokenizer


class Catalog:
    """Models by name. An adapter's name is enough where one bundle has it; `base:adapter` always names one."""

    def __init__(self, bases: Sequence[Base]) -> None:
        self.bases = list(bases)

    def cards(self) -> list[Json]:
        """All models, as `/v1/models` lists them."""
        return [card for base in self.bases for card in _cards(base)]

    def card(self, name: str) -> Json:
        """One of them. ApiError: there is none."""
        base, adapter = self._find(name)
        return _card(base, adapter, name)

    def find(self, name: str, lora: Sequence[Lora] | None = None) -> Model:
        """ApiError: there is none, or not the adapters of `lora`."""
        base, adapter = self._find(name)
        if lora is None:
            return Model(name, base, base.engine.fixed(adapter))
        for one in lora:
            if one.id not in base.engine.bundle.adapters:
                message = f"The adapter {one.id!r} does not exist."
                raise ApiError(404, message, param="lora", code="model_not_found")
        mixed = {one.id: one.scale for one in lora}
        if len(mixed) < len(lora):
            raise ApiError(400, "An adapter stands twice in lora.", param="lora")
        with about("lora"):
            return Model(name, base, base.engine.fixed(mixed))

    def _find(self, name: str) -> tuple[Base, str | None]:
        """An adapter's name wins over that of a base, as in vLLM."""
        for base in self.bases:
            if name in base.engine.bundle.adapters:
                return base, name
        for base in self.bases:
            if name == base.name:
                return base, None
            own = name.removeprefix(f"{base.name}:")
            if own != name and own in base.engine.bundle.adapters:
                return base, own
        raise unknown_model(name, [card["id"] for card in self.cards()])


def names_of(bundles: Sequence[Path]) -> list[str]:
    """What the bases of bundles are called: as their folders, without `.bundle`.

    NameTakenError: two are called alike.
    """
    names = [bundle.resolve().name.removesuffix(".bundle") for bundle in bundles]
    for name in names:
        if names.count(name) > 1:
            hint = "rename the folder of one: a bundle is served by the name of its folder"
            raise NameTakenError(f"two bundles are called {name!r}", hint=hint)
    return names


def _cards(base: Base) -> Iterator[Json]:
    yield _card(base, None, base.name)
    for adapter in base.engine.bundle.adapters:
        yield _card(base, adapter, adapter)


def _card(base: Base, adapter: str | None, name: str) -> Json:
    bundle, origin = base.engine.bundle, None if adapter is None else base.origins.get(adapter)
    entry: AdapterEntry | None = None if adapter is None else bundle.adapters.get(adapter)
    root = str(bundle.path if entry is None else entry.folder)
    return {
        "id": name,
        "object": "model",
        "created": base.created if origin is None else origin.created,
        "owned_by": "bedplate",
        "root": root if origin is None else origin.root,
        "parent": None if adapter is None else base.name,
        "max_model_len": base.engine.limits.max_context,
    }
