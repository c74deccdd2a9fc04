"""Adapters on a disk or in a bucket: a folder that holds the folders of PEFT, or a bundle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from bedplate.bundle import integrity, manifest, strict_json
from bedplate.bundle.manifest import AdapterRecord, Manifest, is_adapter_name
from bedplate.deploy.node_bundle import without_programs
from bedplate.errors import BundleError, NotFoundError, RunError
from bedplate.hashing import sha256_of_few

_CONFIG = "adapter_config.json"  # which PEFT, torchtune and MLX-LM write beside the weights
_TRIES = 3
# What file systems say of a file that another content changes, whatever they call it.
_TELLING = frozenset(
    {
        "size",
        "mtime",
        "created",
        "updated",
        "generation",
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "LastModified",
        "last_modified",
        "VersionId",
        "version_id",
    }
)


class Found(NamedTuple):
    """An adapter in a store. files: by their names, their paths in the store.  stamp: changes when a file does.
    record: of one that is packed.
    """

    name: str
    files: Mapping[str, str]
    stamp: str
    record: AdapterRecord | None = None


class AdapterStore:
    """Adapters by name. url: of a folder that has a folder for each, or of a bundle.  options: of fsspec.
    foundation: the SHA-256 of the one that the adapters of a bundle must be packed for.

    NotFoundError: there is nothing at the URL.  BundleError: it is a bundle of another foundation.
    """

    def __init__(self, url: str, foundation: str, options: Mapping[str, Any] | None = None) -> None:
        self.url, self._foundation = url, foundation
        self._fs, root = fsspec.core.url_to_fs(url, **(options or {}))
        self._root = root.rstrip("/")
        if not self._fs.exists(self._root):
            hint = "create it, or put the first adapter into it"
            raise NotFoundError("there is no folder of adapters", where=url, hint=hint)
        self._is_bundle = self._fs.exists(f"{self._root}/{manifest.MANIFEST}")
        if self._is_bundle:
            self._packed()

    @property
    def folder(self) -> str:
        """The URL of the folder that has a folder for each adapter."""
        url = self.url.rstrip("/")
        return f"{url}/{manifest.ADAPTERS}" if self._is_bundle else url

    def list(self) -> dict[str, Found]:
        """What is there now: the adapters of a bundle, or each folder with an `adapter_config.json` and a name that an
        adapter can have.

        Raises what the file system raises if it cannot be read, and a BundleError.
        """
        if self._is_bundle:
            return self._packed()
        found = self._listed("")
        if not found and not self._fs.exists(self._root):  # which is something else than an empty folder
            raise FileNotFoundError(self.url)
        return found

    def fetch(self, name: str, folder: Path) -> Found:
        """Put the files of an adapter into `folder`, which is empty.

        NotFoundError: it is not there.  BundleError: a file of a packed one is damaged.  RunError: it changes all the
        time.
        """
        for _ in range(_TRIES):
            before = self._one(name)
            for file in folder.iterdir():
                file.unlink()
            for file_name, path in before.files.items():
                self._fs.get_file(path, str(folder / file_name))
            if self._one(name).stamp == before.stamp:
                if before.record is not None:
                    integrity.check_files(folder, before.record.files, hashes=True)
                return before
        hint = "write an adapter under another name that begins with a dot, and rename it when it is complete"
        raise RunError("it changes while it is read", where=f"{self.url}/{name}", hint=hint)

    def _one(self, name: str) -> Found:
        found = (self._packed() if self._is_bundle else self._listed(f"/{name}")).get(name)
        if found is None:
            raise NotFoundError(f"no adapter {name!r}", where=self.url)
        return found

    def _packed(self) -> dict[str, Found]:
        where = f"{self.url}/{manifest.MANIFEST}"
        document = manifest.load(Manifest, self._fs.cat_file(f"{self._root}/{manifest.MANIFEST}"), where)
        if document.files[manifest.FOUNDATION].sha256 != self._foundation:
            raise BundleError("its adapters are packed for another foundation", where=self.url)
        folder = f"{self._root}/{manifest.ADAPTERS}"
        found = {}
        for name, record in without_programs(document).adapters.items():
            files = {file: f"{folder}/{name}/{file}" for file in record.files}
            found[name] = Found(name, files, sha256_of_few(strict_json.dump(vars(record))), record)
        return found

    def _listed(self, below: str) -> dict[str, Found]:
        self._fs.invalidate_cache()  # of what it listed before
        parts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for path, info in self._fs.find(self._root + below, detail=True).items():
            inner = path.removeprefix(f"{self._root}/").split("/")
            if len(inner) == 2:
                parts[inner[0]][inner[1]] = info
        return {
            name: Found(name, {file: info["name"] for file, info in files.items()}, _stamp(files))
            for name, files in sorted(parts.items())
            if _CONFIG in files and is_adapter_name(name)
        }


def _stamp(files: Mapping[str, Mapping[str, Any]]) -> str:
    said = [
        (name, sorted((key, str(value)) for key, value in info.items() if key in _TELLING))
        for name, info in sorted(files.items())
    ]
    return sha256_of_few(repr(said).encode())
