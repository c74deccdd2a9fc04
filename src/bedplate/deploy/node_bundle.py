"""A bundle on this machine: fetched once, if it is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from platformdirs import user_cache_path

import bedplate
from bedplate.bundle import files, manifest
from bedplate.bundle.integrity import all_files
from bedplate.bundle.manifest import Manifest
from bedplate.errors import NotFoundError
from bedplate.hashing import sha256_of_few


def cache_folder(given: str | None) -> Path:
    """Where a node keeps what it has fetched."""
    folder = user_cache_path("bedplate") / "deploy" if given is None else Path(given)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def name_of(bundle: str) -> str:
    """What the base of a bundle is called: as its folder, without `.bundle`."""
    return PurePosixPath(bundle.rstrip("/")).name.removesuffix(".bundle")


def local_bundle(url: str, cache: Path, options: Mapping[str, Any] | None = None) -> Path:
    """The folder of a bundle on this machine. One that is elsewhere is fetched without its programs, once: whoever
    comes while it is fetched waits. Every file is checked against its SHA-256.

    NotFoundError: there is no bundle at the URL.  BundleError: a file is damaged.
    """
    fs, root = fsspec.core.url_to_fs(url, **(options or {}))
    if isinstance(fs, LocalFileSystem):
        return Path(root)
    try:
        data: bytes = fs.cat_file(f"{root}/{manifest.MANIFEST}")
    except FileNotFoundError as error:
        raise NotFoundError("not a bundle: it has no bundle.json", where=url) from error
    folder = cache / f"bundle-{sha256_of_few(data)[:32]}"
    with files.locked(cache):
        if not folder.exists():
            document = without_programs(manifest.load(Manifest, data, f"{url}/{manifest.MANIFEST}"))
            with files.workspace(cache, folder.name) as draft:
                for name in all_files(document):
                    (draft / name).parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(f"{root}/{name}", str(draft / name))
                files.write(draft / manifest.MANIFEST, manifest.dump(document))
                bedplate.Bundle.open(draft)
                files.sync_tree(draft)
                files.rename_new(draft, folder)
    return folder


def without_programs(document: Manifest) -> Manifest:
    """Of a bundle that only computes from its constants."""
    programs = {*manifest.BASE_PROGRAMS.values(), *manifest.ADAPTER_PROGRAMS.values()}
    adapters = {
        name: replace(
            record, files={file: info for file, info in record.files.items() if file not in programs}
        )
        for name, record in document.adapters.items()
    }
    kept = {file: info for file, info in document.files.items() if file not in programs}
    return replace(document, files=kept, adapters=adapters)
