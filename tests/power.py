"""What a power cut would leave: a model of a disk that keeps what was synced, and of the rest what is worst.

A file's bytes are safe when the file was synced after the last write; a folder's names when the folder was. A name
that changed since its folder was synced may be there or not, each folder on its own. A file that was not synced since
it was written is empty.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bedplate.bundle import files

Tree = Mapping[str, bytes]  # contents by path; a folder's path ends with a slash
Listing = dict[str, int]  # names of a folder → inodes
_WATCHED = ("fsync", "rename", "replace", "unlink", "rmdir")


class PowerCuts:
    """While it is entered, cuts the power before and after each call that changes names or syncs, and judges.

    judge: whatever can be seen of what a cut leaves; it raises if that is damaged. Hidden files and folders are not
    part of it.  seen: all that was judged to be there after some cut.
    """

    def __init__(self, root: Path, judge: Callable[[Tree], Hashable]) -> None:
        self.seen: set[Hashable] = set()
        self._root, self._judge = root, judge
        self._names: dict[int, Listing] = {}
        self._contents: dict[int, bytes] = {}
        self._held: dict[int, int] = {}  # open files, so that no inode is given to another file
        self._patch = pytest.MonkeyPatch()
        self._busy = False
        for path in [root, *root.rglob("*")]:
            handle = os.open(path, os.O_RDONLY)
            self._sync(handle)
            os.close(handle)

    def __enter__(self) -> PowerCuts:
        for name in _WATCHED:
            self._watch(os, name)
        self._watch(files, "_renameat2")
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        for handle in self._held.values():
            os.close(handle)

    def durable(self) -> Hashable:
        """What is judged to be there if nothing but what was synced is."""
        return self._judge(self._tree({}))

    def _watch(self, module: Any, name: str) -> None:
        original = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return original(*args, **kwargs)
            self._cut()
            result = original(*args, **kwargs)
            if name == "fsync":
                self._sync(args[0])
            self._cut()
            return result

        self._patch.setattr(module, name, watched)

    def _sync(self, handle: int) -> None:
        status = os.fstat(handle)
        if status.st_ino not in self._held:
            self._held[status.st_ino] = os.dup(handle)
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = _listing(handle)
        else:
            self._contents[status.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def _cut(self) -> None:
        self._busy = True
        now = {path.stat().st_ino: _listing(path) for path in self._folders(self._root)}
        pending = [inode for inode, names in now.items() if names != self._names.get(inode, {})]
        for count in range(len(pending) + 1):
            for those in itertools.combinations(pending, count):
                self.seen.add(self._judge(self._tree({inode: now[inode] for inode in those})))
        self._busy = False

    def _folders(self, folder: Path) -> Iterator[Path]:
        yield folder
        for path in folder.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                yield from self._folders(path)

    def _tree(self, newer: Mapping[int, Listing]) -> Tree:
        """Contents by path, with names of some folders as they are now, and of the others as they were synced."""
        dirty = {
            path.stat().st_ino
            for path in self._root.rglob("*")
            if path.is_file() and path.read_bytes() != self._contents.get(path.stat().st_ino)
        }
        folders = {path.stat().st_ino for path in self._root.rglob("*") if path.is_dir()} | self._names.keys()
        tree: dict[str, bytes] = {}

        def walk(inode: int, path: str) -> None:
            for name, child in newer.get(inode, self._names.get(inode, {})).items():
                if name.startswith("."):
                    continue
                if child in folders:
                    tree[f"{path}{name}/"] = b""
                    walk(child, f"{path}{name}/")
                else:
                    tree[path + name] = b"" if child in dirty else self._contents.get(child, b"")

        walk(self._root.stat().st_ino, "")
        return tree


def _listing(folder: int | Path) -> Listing:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries}
