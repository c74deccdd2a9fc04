"""What all workers of a test run share: made once, by whichever needs it first, and then only read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

Tree = dict[str, tuple[int, int]]


class Shared:
    """A folder of one test run.

    `units` is its cache of compiled programs, to which every test adds. What `made` gives must not be changed: a test
    that wants to change a bundle copies it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Path, Tree] = {}
        self.units = folder / "units"
        self.units.mkdir(parents=True, exist_ok=True)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """What `make` has written to the path that it was given, in this process or in another one.

        A `make` that fails leaves nothing, and whoever comes next tries again.
        """
        path = self._folder / name
        with FileLock(self._folder / f"{name}.lock"):
            if not path.exists():
                draft = self._folder / "drafts" / name
                shutil.rmtree(draft, ignore_errors=True)
                draft.parent.mkdir(exist_ok=True)
                make(draft)
                draft.rename(path)
        self._made.setdefault(path, _tree(path))
        return path

    def changed(self) -> list[Path]:
        """Those of what `made` has given to this process that are no longer as they were."""
        return [path for path, before in self._made.items() if _tree(path) != before]

    def copy_units(self, folder: Path) -> Path:
        """The compiled programs that there are now, in a folder that no other test writes to."""
        folder.mkdir()
        for entry in self.units.glob("*.unit"):
            os.link(entry, folder / entry.name)  # an entry is replaced whole, never written to
        return folder


def _tree(folder: Path) -> Tree:
    """Size and time of the last change of every file below, but for the lock that writers of a bundle leave."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
