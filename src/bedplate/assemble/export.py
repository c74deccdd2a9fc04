"""A program of a bundle → one stock ExecuTorch file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bedplate.assemble.report import SILENT, load_exporter
from bedplate.bundle import manifest
from bedplate.bundle.files import replacing
from bedplate.bundle.fit import program_keys
from bedplate.bundle.ptd import read_ptd
from bedplate.bundle.store import Bundle
from bedplate.constants import Constant
from bedplate.errors import NotFoundError


def export_program(
    bundle: Bundle,
    out: Path,
    *,
    adapter: str | None,
    static: bool,
    self_contained: bool,
    with_foundation: bool,
) -> None:
    """Write a program of the bundle to `out`. Its own constants and those of the foundation go inside on request."""
    file = bundle.program(adapter, static=static)
    if not out.parent.is_dir():
        raise NotFoundError("no such folder", where=out.parent, hint="create it first")
    entry = None if adapter is None else bundle.adapters[adapter]
    program = file.read_bytes()
    inside: dict[str, Constant] = {}
    if entry is not None and self_contained:
        inside |= _constants(entry.weights, entry.info.constants)
    if with_foundation:
        named = program_keys(file)
        foundation = _constants(bundle.foundation, bundle.foundation_info.constants)
        inside |= {key: constant for key, constant in foundation.items() if key in named}
    if inside:
        load_exporter(SILENT)
        from bedplate.link.embed import embed

        program = embed(program, inside)
    with replacing(out) as draft:
        draft.write(program)


def _constants(file: Path, infos: Iterable[manifest.ConstantInfo]) -> dict[str, Constant]:
    data = read_ptd(file)
    return {
        info.key: Constant(
            key=info.key,
            name=info.name,
            dtype=info.dtype,
            shape=info.shape,
            layout=info.layout,
            data=data.data(info.key),
        )
        for info in infos
    }
