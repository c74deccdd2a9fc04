"""The models of a replica: its base, the adapters of its bundle, and those of a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bedplate.bundle.manifest import ADAPTERS
from bedplate.deploy.listing import Listing
from bedplate.serve.catalog import Base, Catalog, Json, Model
from bedplate.serve.errors import unknown_model
from bedplate.serve.wire import Lora


class StoreCatalog(Catalog):
    """Lists adapters that nobody has asked for yet. url, folder: where the bundle is, and what of the store has the
    folders of adapters."""

    def __init__(
        self, base: Base, own: Sequence[str], listing: Listing, *, url: str, folder: str | None
    ) -> None:
        super().__init__([base])
        self._base, self._own, self._listing = base, own, listing
        self._url, self._folder = url, folder

    def cards(self) -> list[Json]:
        return [self._card(name, name) for name in (None, *self._names())]

    def card(self, name: str) -> Json:
        return self._card(self._adapter(name), name)

    def find(self, name: str, lora: Sequence[Lora] | None = None) -> Model:
        self._adapter(name)  # one that has been removed may be there for others still
        return super().find(name, lora)

    def _names(self) -> Iterator[str]:
        yield from self._own
        yield from self._listing.found

    def _adapter(self, name: str) -> str | None:
        """The adapter that a model is (None: it is the base). ApiError: there is no such model."""
        known = frozenset(self._names())
        if name in known:
            return name
        if name == self._base.name:
            return None
        own = name.removeprefix(f"{self._base.name}:")
        if own not in known:
            raise unknown_model(name, [card["id"] for card in self.cards()])
        return own

    def _card(self, adapter: str | None, name: str | None) -> Json:
        if adapter is None:
            root = self._url
        else:
            folder = f"{self._url.rstrip('/')}/{ADAPTERS}" if adapter in self._own else self._folder
            root = f"{folder}/{adapter}"
        return {
            "id": name or self._base.name,
            "object": "model",
            "created": self._base.created,
            "owned_by": "bedplate",
            "root": root,
            "parent": None if adapter is None else self._base.name,
            "max_model_len": self._base.engine.limits.max_context,
        }
