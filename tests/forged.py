"""Bundles that agree with themselves and lie: other bytes under a key, with every hash and digest made to fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bedplate.bundle import integrity, manifest, strict_json
from bedplate.bundle.manifest import AdapterInfo, ConstantInfo, FoundationInfo, Manifest
from bedplate.bundle.ptd import read_ptd


def flip(file: Path, key: str, byte: int = 0) -> None:
    """Flip a bit of what the data file holds under `key`."""
    entry = read_ptd(file).entries[key]
    with file.open("r+b") as data:
        data.seek(entry.offset + byte % entry.nbytes)
        (old,) = data.read(1)
        data.seek(-1, 1)
        data.write(bytes([old ^ 1]))


def describe(file: Path, edit: Callable[[ConstantInfo], ConstantInfo]) -> None:
    """Edit what a `foundation.json` or `adapter.json` tells of each constant."""
    kind = FoundationInfo if file.name == manifest.FOUNDATION_INFO else AdapterInfo
    document = manifest.load(kind, file.read_bytes(), str(file))
    edited = dataclasses.replace(document, constants=tuple(map(edit, document.constants)))
    file.write_bytes(manifest.dump(edited))


def signed(document: dict[str, Any]) -> bytes:
    """The bytes of a `bundle.json` with a digest that fits what the document says."""
    fields = {name: value for name, value in document.items() if name != "digest"}
    return strict_json.dump({**fields, "digest": manifest._digest(fields)})


def settle(bundle: Path) -> None:
    """Make hashes and digests fit what the files hold now, so that opening the bundle finds nothing."""
    file = bundle / manifest.MANIFEST
    document = manifest.load(Manifest, file.read_bytes(), str(file))
    measured = integrity.measure(bundle)
    foundation = measured[manifest.FOUNDATION].sha256
    records = {}
    for name in document.adapters:
        folder = bundle / manifest.ADAPTERS / name
        described = folder / manifest.ADAPTER_INFO
        info = manifest.load(AdapterInfo, described.read_bytes(), str(described))
        described.write_bytes(manifest.dump(dataclasses.replace(info, foundation=foundation)))
        records[name] = dataclasses.replace(
            document.adapters[name], foundation=foundation, files=integrity.measure(folder)
        )
    edited = dataclasses.replace(
        document, files={name: measured[name] for name in document.files}, adapters=records
    )
    file.write_bytes(manifest.dump(edited))
