"""The parts of an open bundle."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from bedplate.bundle import manifest, strict_json
from bedplate.bundle.manifest import AdapterInfo, AdapterRecord
from bedplate.errors import BundleError


class ChatSettings(NamedTuple):
    """How a conversation becomes text. template_file: None if there is no template.

    special_tokens: `bos_token`, `eos_token` … as text, for the template.
    """

    template_file: Path | None
    special_tokens: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class AdapterEntry:
    """An adapter of an open bundle.

    folder: where its files are. foundation: SHA-256 of the bundle's foundation. record: what `bundle.json` says of it.
    program, static_program (of fixed shapes): None if it has none.
    """

    name: str
    folder: Path
    foundation: str
    record: AdapterRecord
    program: Path | None
    static_program: Path | None

    @classmethod
    def of(cls, name: str, folder: Path, foundation: str, record: AdapterRecord) -> Self:
        """What `record` lists, in `folder`."""
        program, static = (
            folder / file if file in record.files else None for file in manifest.ADAPTER_PROGRAMS.values()
        )
        return cls(
            name=name,
            folder=folder,
            foundation=foundation,
            record=record,
            program=program,
            static_program=static,
        )

    @property
    def nbytes(self) -> int:
        """Of its programs and weights."""
        files = (self.program, self.static_program, self.weights)
        return sum(file.stat().st_size for file in files if file is not None)

    @property
    def weights(self) -> Path:
        return self.folder / manifest.ADAPTER_WEIGHTS

    @functools.cached_property
    def info(self) -> AdapterInfo:
        """The content of `adapter.json`, read when it is first used. BundleError: see `read_info`."""
        return self.read_info()

    def read_info(self) -> AdapterInfo:
        """The content of `adapter.json`, which is long and is not kept.

        BundleError: it is damaged, or describes another adapter, or one that was packed against another foundation.
        """
        return self.decode_info(self.read_info_bytes())

    def read_info_bytes(self) -> bytes:
        """The bytes of `adapter.json`. BundleError: it is larger than any is."""
        return strict_json.read(self.folder / manifest.ADAPTER_INFO)

    def decode_info(self, data: bytes) -> AdapterInfo:
        """What the bytes of `adapter.json` say. BundleError: see `read_info`."""
        where = self.folder / manifest.ADAPTER_INFO
        info = manifest.load(AdapterInfo, data, str(where))
        if info.name != self.name:
            hint = f"add {self.name!r} again"
            raise BundleError(f"it describes the adapter {info.name!r}", where=where, hint=hint)
        check_foundation(self, info.foundation, where)
        return info


def check_foundation(entry: AdapterEntry, packed_against: str, where: Path) -> None:
    """BundleError: the adapter was packed against another foundation than the bundle's."""
    if packed_against != entry.foundation:
        bundle = entry.folder.parent.parent
        raise BundleError(
            f"it was packed against another foundation: {packed_against[:12]}…, not {entry.foundation[:12]}…",
            where=where,
            hint=f"remove it (bedplate remove {bundle} {entry.name}) and add the adapter again, to this bundle",
        )
