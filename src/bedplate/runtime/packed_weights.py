"""Packed weights on disk: what XNNPACK makes of a foundation when it is loaded, for later processes to map.

ExecuTorch reads and writes such files (`packed_cache_path`). But it does not check what is in them; a process that
has written one adds what it loads after; and whoever has one open keeps others out. So here a file is written by
loading the base alone, in a workspace, and gets a name that tells its SHA-256. A process that uses it holds a shared
lock: then ExecuTorch, in any process, still maps the file, and cannot lock it to write.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bedplate import _native
from bedplate.bundle import files, integrity
from bedplate.bundle.manifest import BASE_PROGRAM, FOUNDATION
from bedplate.bundle.store import Bundle
from bedplate.errors import RunError

_SUFFIX = ".packed"
_LONGEST_PATH = 255  # that ExecuTorch takes
_KEY_LENGTH = 32


class PackedFile:
    """A file of packed weights, not to be written while this lives. Hashed beside whatever its owner does next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._file)
        fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._sha256 = ""
        self._hashing = threading.Thread(target=self._hash)
        self._hashing.start()

    def _hash(self) -> None:
        if os.fstat(self._file).st_size == 0:
            return  # nothing cannot be mapped
        with mmap.mmap(self._file, 0, prot=mmap.PROT_READ) as data:
            self._sha256 = hashlib.sha256(data).hexdigest()  # at one go, without the GIL

    def is_whole(self) -> bool:
        """Whether it is still there and holds what was written into it. Waits until that is known."""
        self._hashing.join()
        return self.path.exists() and self.path.name.endswith(f"-{self._sha256}{_SUFFIX}")

    def close(self) -> None:
        """Let go of it."""
        self._hashing.join()
        self._close()


class PackedWeights:
    """The file of one bundle's foundation, in a folder which several bundles may share.

    RunError, here and below: the folder cannot be used.
    """

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self._folder = folder.absolute()
        self._bundle = bundle
        self._key = _key(bundle)
        self._room = 2 * bundle.manifest.files[FOUNDATION].size
        name_length = len(f"/{self._key}-{hashlib.sha256().hexdigest()}{_SUFFIX}")
        if len(os.fsencode(self._folder)) + name_length > _LONGEST_PATH:
            hint = f"choose a path of at most {_LONGEST_PATH - name_length} bytes: ExecuTorch takes no more"
            raise RunError("the path is too long for packed weights", where=self._folder, hint=hint)
        with _folder_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._find()

    def path(self, write: Callable[[Path], None]) -> Path:
        """Of the file. If there is none, or a damaged one, `write` is called to make it.

        BundleError: it would have to be made of a damaged foundation.
        """
        with _folder_errors(self._folder):
            self._file = self._file or self._find()
        if self._file is not None and not self._file.is_whole():
            self._file.path.unlink(missing_ok=True)
            self.close()
        if self._file is None:
            with _folder_errors(self._folder):
                self._file = PackedFile(self._write(write))
            if not self._file.is_whole():
                hint = "choose another folder, or run without packed weights on disk"
                raise RunError(
                    "the packed weights changed after they were written", where=self._file.path, hint=hint
                )
        return self._file.path

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _find(self) -> PackedFile | None:
        found = sorted(self._folder.glob(f"{self._key}-*{_SUFFIX}"))
        return PackedFile(found[0]) if found else None

    def _write(self, write: Callable[[Path], None]) -> Path:
        free = shutil.disk_usage(self._folder).free
        if free < self._room:  # ExecuTorch writes through a mapping: a full disk would end the process
            raise RunError(
                f"packed weights need {self._room >> 20} MB, but only {free >> 20} MB are free",
                where=self._folder,
                hint="free some space, or run without packed weights on disk",
            )
        # The file's name says what it was packed from; whoever maps it later takes the manifest's word for that.
        packed_from = {name: self._bundle.manifest.files[name] for name in (FOUNDATION, BASE_PROGRAM)}
        integrity.check_files(self._bundle.path, packed_from, hashes=True)
        with files.workspace(self._folder, self._key) as workspace:
            draft = workspace / "weights"
            write(draft)
            path = self._folder / f"{self._key}-{files.sha256_file(draft)}{_SUFFIX}"
            files.sync_tree(workspace)
            draft.chmod(0o444)
            draft.replace(path)
            files.sync_folder(self._folder)
        return path


@contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"packed weights cannot be kept there: {error.strerror}"
        hint = "choose a folder that can be written, or run without packed weights on disk"
        raise RunError(what, where=error.filename or folder, hint=hint) from error


def _key(bundle: Bundle) -> str:
    """Names what decides how weights are packed: their bytes, which program names them, XNNPACK, the processor."""
    parts = (
        bundle.foundation_sha256,
        bundle.manifest.files[BASE_PROGRAM].sha256,
        _native.EXECUTORCH_VERSION,
        os.uname().machine,
        _processor_features(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:_KEY_LENGTH]


def _processor_features() -> str:
    """The instruction sets, by which XNNPACK chooses a layout."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
