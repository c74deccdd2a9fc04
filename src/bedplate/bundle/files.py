"""Folders and files on disk that are either there in full or not at all.

A finished file or folder gets its name in one rename, after its bytes have reached the disk: whoever looks,
and whenever the process is killed, sees the old one or the new one. What is being built lies beside it in a
hidden `.NAME.tmp-XXXXXXXX` folder with a locked `.lock` in it. The kernel drops the lock with the process, so
an unlocked one is a leftover, and the next command removes it.

Whoever only reads a bundle imports this too, so what only writers need is imported where they use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


@contextlib.contextmanager
def naming(target: Path, draft: Path | None = None) -> Iterator[None]:
    """Has every OSError of the block name the file that the user knows: `target`, if the error names none (a write
    to a full disk does not); what is to be there instead, if it names the hidden `draft` or a file in it.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(target)
        elif draft is not None and Path(os.fsdecode(error.filename)).is_relative_to(draft):
            error.filename = str(target / Path(os.fsdecode(error.filename)).relative_to(draft))
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the block ends without an error, and not before.

    One writer at a time, others wait: what a killed one left, the next one overwrites.
    """
    draft = path.with_name(f".{path.name}.tmp")
    with naming(path, draft), _locked(draft) as handle, open(handle, "wb", closefd=False) as file:
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(handle)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write a file of a draft, which `sync_tree` makes durable. An OSError names it."""
    with naming(path):
        path.write_bytes(data)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is one only when its folder has reached the disk)."""
    _sync(folder)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder`, and itself, durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_dir():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the one writer's lock of `folder`, waiting for whoever holds it. FileNotFoundError: no such
    folder.
    """
    with _locked(folder / LOCK):
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock of a file, which is made if it is not there, waiting for whoever holds it. Gives its handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # While we waited, the file, or its folder, may have been swapped for another or removed: lock what
            # is there now.
            if is_at(handle, path):
                yield handle
                return
        finally:
            os.close(handle)


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def workspace(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder beside `parent/name` to build it in. Whatever is left of it at the end is removed."""
    remove_leftovers(parent, name)
    while True:
        folder = parent / f".{name}.tmp-{os.urandom(4).hex()}"
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(folder))
            except FileNotFoundError:
                continue  # taken for a leftover before it was locked
            stack.callback(remove_tree, folder)
            yield folder
            return


def remove_leftovers(parent: Path, name: str) -> None:
    """Remove the workspaces of processes that are gone; those of running ones are locked and stay."""
    import glob

    for folder in sorted(parent.glob(f".{glob.escape(name)}.tmp-????????")):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(folder)
            except BlockingIOError:
                pass
            finally:
                os.close(handle)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as possible."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that nothing has. FileExistsError: something has it."""
    if not _renameat2(source, target, _NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)


def swap(source: Path, target: Path) -> None:
    """Exchange two folders: in one step where the system can, else in three."""
    if not _renameat2(source, target, _EXCHANGE):
        swap_in_steps(source, target)


def swap_in_steps(source: Path, target: Path) -> None:
    """Exchange two folders by plain renames; between the first and the second, nothing has the name
    `target`.
    """
    aside = source.with_name(f"{source.name}-old")
    target.rename(aside)
    source.rename(target)
    aside.rename(source)


_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags (the standard library has no name for it). False: this system cannot."""
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(target))
