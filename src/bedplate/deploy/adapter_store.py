"""A folder of adapters, on a disk or in a bucket: `URL/NAME` holds the files of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from bedplate.bundle.manifest import is_adapter_name
from bedplate.errors import NotFoundError, RunError
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
    """An adapter in a store. files: by their names, their paths in the store.  stamp: changes when a file does."""

    name: str
    files: Mapping[str, str]
    stamp: str


class AdapterStore:
    """Adapters by name. url: a folder, or any URL that fsspec knows.  options: of its file system.

    NotFoundError: there is nothing at the URL.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self._fs, root = fsspec.core.url_to_fs(url, **(options or {}))
        self._root = root.rstrip("/")
        if not self._fs.exists(self._root):
            hint = "create it, or put the first adapter into it"
            raise NotFoundError("there is no folder of adapters", where=url, hint=hint)

    def list(self) -> dict[str, Found]:
        """What is there now. A folder counts if it has an `adapter_config.json`, and a name that an adapter can have.

        Raises what the file system raises if it cannot be read.
        """
        found = self._listed("")
        if not found and not self._fs.exists(self._root):  # which is something else than an empty folder
            raise FileNotFoundError(self.url)
        return found

    def fetch(self, name: str, folder: Path) -> Found:
        """Put the files of an adapter into `folder`, which is empty.

        NotFoundError: it is not there.  RunError: it changes all the time.
        """
        for _ in range(_TRIES):
            before = self._one(name)
            for file in folder.iterdir():
                file.unlink()
            for file_name, path in before.files.items():
                self._fs.get_file(path, str(folder / file_name))
            if self._one(name).stamp == before.stamp:
                return before
        hint = "write an adapter under another name that begins with a dot, and rename it when it is complete"
        raise RunError("it changes while it is read", where=f"{self.url}/{name}", hint=hint)

    def _one(self, name: str) -> Found:
        found = self._listed(f"/{name}").get(name)
        if found is None:
            raise NotFoundError(f"no adapter {name!r}", where=self.url)
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
