"""Checks that the programs and the constants of an adapter fit each other and the foundation."""

from __future__ import annotations

from pathlib import Path

from bedplate.bundle.manifest import ADAPTER_PROGRAMS, ADAPTER_WEIGHTS, AdapterInfo
from bedplate.bundle.ptd import read_ptd
from bedplate.errors import AdapterError, LoweringError
from bedplate.names import KEY_IN_PROGRAM


def program_keys(program: Path) -> frozenset[str]:
    """The keys that a `.pte` names."""
    return frozenset(match.decode() for match in KEY_IN_PROGRAM.findall(program.read_bytes()))


def check_adapter(info: AdapterInfo, folder: Path, foundation: Path) -> None:
    """Check, before an adapter is published, that its files, the foundation and `info` fit each other.

    AdapterError: they share a key.  LoweringError: a program of it names a constant that no file holds, or its file
    holds one that the program does not name.
    """
    held, own = read_ptd(foundation).entries.keys(), read_ptd(folder / ADAPTER_WEIGHTS).entries.keys()
    assert own == {constant.key for constant in info.constants}, (
        "adapter.json must list what weights.ptd holds"
    )
    if shared := own & held:
        names = sorted(constant.name for constant in info.constants if constant.key in shared)
        raise AdapterError(
            f"{len(shared)} of its constants are in the foundation already, {names[0]} among them",
            where=f"adapter {info.name}",
            hint="leave out what the foundation holds: ExecuTorch refuses two files that share a key",
        )
    for file in ADAPTER_PROGRAMS.values():
        if not (folder / file).exists():
            continue
        named = program_keys(folder / file)
        if wrong := sorted((named - own - held) | (own - named)):
            raise LoweringError(
                f"its program {file} and its constants do not fit each other: {len(wrong)} keys are only in one of "
                f"them, {wrong[0]} among them",
                where=f"adapter {info.name}",
                hint="compiled units are damaged: bedplate cache clear, then add it again",
            )
