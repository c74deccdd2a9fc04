"""The facts that the writers of a bundle's files give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bedplate.bundle.manifest import AdapterInfo, ConstantInfo


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """The facts that the writer of a bundle's files gives. Sizes and hashes are measured. See Manifest."""

    model: dict[str, Any]
    recipe: dict[str, Any]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    constants: tuple[ConstantInfo, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """The facts that the writer of an adapter's files gives. special_tokens: see AdapterRecord."""

    info: AdapterInfo
    special_tokens: dict[str, str] | None
