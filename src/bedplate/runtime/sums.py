"""Several adapters at once, each times its own scale: what their A and B add, one after the other."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from weakref import WeakValueDictionary

from bedplate import _native
from bedplate.errors import UnsupportedError
from bedplate.runtime.prefix_cache import digest
from bedplate.runtime.weights import Weights


class Sums:
    """The sums that are in use, each once: rows of the same one are computed together."""

    def __init__(self) -> None:
        self._known = WeakValueDictionary[tuple[tuple[_native.Adapter, float], ...], _native.Adapter]()

    def of(self, base: Weights, parts: Mapping[str, tuple[Weights, float]]) -> Weights:
        """The sum of adapters, each with its scale, by their names. The order of the names changes nothing.

        UnsupportedError: an adapter has more than A and B.
        """
        for name, (weights, _) in parts.items():
            if weights.unsummable is not None:
                raise UnsupportedError(
                    f"the adapter {name} has {weights.unsummable}, so it cannot be used together with others",
                    hint="use it alone; adapters of A and B alone, with the base's tokenizer, can be used together",
                )
        # In an order that no name has a part in. What has the same constants and scale adds the same.
        found = sorted(
            ((weights, _single(scale)) for weights, scale in parts.values() if _single(scale) != 0),
            key=lambda one: (one[0].file, one[1], one[0].content.adapter),
        )
        if len(found) < 2:
            return found[0][0].scaled(found[0][1]) if found else base
        key = tuple((weights.adapter, scale) for weights, scale in found if weights.adapter is not None)
        native = self._known.get(key)
        if native is None:
            native = self._known[key] = _native.Adapter.sum(key)
        terms = [
            digest(adapter=weights.content.adapter, scale=struct.pack("<f", scale))
            for weights, scale in found
        ]
        content = base.content._replace(adapter=digest(sum="".join(terms)))
        return base._replace(adapter=native, content=content)


def _single(scale: float) -> float:
    """As the native layer has it: of 32 bits."""
    single: float = struct.unpack("<f", struct.pack("<f", scale))[0]
    return single
