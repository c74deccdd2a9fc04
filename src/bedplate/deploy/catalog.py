"""The models of a replica: its base, the adapters of its bundle, and those of a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace

from bedplate.deploy.listing import Listing
from bedplate.serve.catalog import Base, Catalog, Json, Model
from bedplate.serve.errors import ApiError, unknown_model
from bedplate.serve.wire import Lora

# What the adapters of the request mean that runs now: names in the replica's own bundle.
HELD: ContextVar[Mapping[str, str]] = ContextVar("HELD")


class StoreCatalog(Catalog):
    """Lists adapters that nobody has asked for yet. url, store_url: where the bundle and the store are."""

    def __init__(
        self, base: Base, own: Sequence[str], listing: Listing, *, url: str, store_url: str | None
    ) -> None:
        super().__init__([base])
        self._base, self._own, self._listing = base, own, listing
        self._url, self._store_url = url, store_url

    def cards(self) -> list[Json]:
        return [self._card(name, name) for name in (None, *self._names())]

    def card(self, name: str) -> Json:
        return self._card(self._adapter(name), name)

    def find(self, name: str, lora: Sequence[Lora] | None = None) -> Model:
        adapter, held = self._adapter(name), HELD.get({})
        wanted = [one.id for one in lora] if lora is not None else [] if adapter is None else [adapter]
        for one in wanted:
            if one not in held:
                message = f"The adapter {one!r} does not exist."
                raise ApiError(
                    404, message, param="model" if lora is None else "lora", code="model_not_found"
                )
        meant = [Lora(id=held[one.id], scale=one.scale) for one in lora] if lora is not None else None
        local = held[wanted[0]] if lora is None and wanted else self._base.name
        return replace(super().find(local, meant), id=name)

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
            root = f"{self._url}/adapters" if adapter in self._own else str(self._store_url)
            root = f"{root.rstrip('/')}/{adapter}"
        return {
            "id": name or self._base.name,
            "object": "model",
            "created": self._base.created,
            "owned_by": "bedplate",
            "root": root,
            "parent": None if adapter is None else self._base.name,
            "max_model_len": self._base.engine.limits.max_context,
        }
