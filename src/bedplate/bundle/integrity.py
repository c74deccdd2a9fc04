"""Whether the files of a bundle are what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bedplate.bundle import files
from bedplate.bundle.manifest import ADAPTERS, FileInfo, Manifest
from bedplate.errors import BundleError
from bedplate.hashing import sha256_file


def measure(folder: Path) -> dict[str, FileInfo]:
    """Size and SHA-256 of every file below `folder` but the lock, by relative path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != files.LOCK)
    return {
        path.relative_to(folder).as_posix(): FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
        for path in found
    }


def check_files(folder: Path, expected: Mapping[str, FileInfo], *, hashes: bool) -> None:
    """Every expected file (by relative path) is there and has its size and, with `hashes`, its SHA-256.

    BundleError: some do not. The error names all of them.
    """
    problems = {name: _problem(folder / name, info, hashes) for name, info in expected.items()}
    damaged = {name: problem for name, problem in problems.items() if problem is not None}
    if len(damaged) == 1:
        ((name, problem),) = damaged.items()
        raise BundleError(problem, where=folder / name, hint=_hint(folder, name))
    if damaged:
        listed = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
        hint = "\n      ".join(dict.fromkeys(_hint(folder, name) for name in damaged))
        raise BundleError(f"{len(damaged)} files are damaged: {listed}", where=folder, hint=hint)


def all_files(manifest: Manifest) -> dict[str, FileInfo]:
    """What the manifest says of each file of the bundle and of its adapters, by relative path."""
    every = dict(manifest.files)
    for name, record in manifest.adapters.items():
        every |= {f"{ADAPTERS}/{name}/{file}": info for file, info in record.files.items()}
    return every


def _problem(path: Path, info: FileInfo, hashes: bool) -> str | None:
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    if size != info.size:
        return f"it has {size} bytes, not {info.size}: cut short or overwritten"
    if hashes and sha256_file(path) != info.sha256:
        return "its SHA-256 is not the one in bundle.json: it was changed or is damaged"
    return None


def _hint(folder: Path, name: str) -> str:
    if name.startswith(f"{ADAPTERS}/"):
        adapter = name.split("/")[1]
        return f"restore it from a copy, or add the adapter again after bedplate remove {folder} {adapter}"
    return f"restore it from a copy, or build the bundle again: bedplate build MODEL -o {folder} --force"
