"""The cache of compiled units is a convenience: a folder that cannot be used is a note, not a failure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from recorder import Recorder
from toy import BuildToy

import bedplate


@pytest.mark.slow
def test_a_build_whose_units_cannot_be_kept(
    build_toy: BuildToy, toy_model: Path, toy_bundle: bedplate.Bundle, tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("a file")
    told = Recorder()
    built = bedplate.build(
        toy_model, tmp_path / "b", max_context=128, unit_cache=tmp_path / "home" / "units", reporter=told
    )
    (note,) = told.notices
    assert note.startswith("compiled units are not kept, so the next command compiles again: ")
    assert f"{tmp_path / 'home' / 'units'}" in note and "Not a directory" in note
    # Not only the cache makes builds alike: this cold compile gives the same bytes.
    warm = build_toy()
    files = sorted(path.relative_to(warm.path) for path in warm.path.rglob("*") if path.is_file())
    assert len(files) >= 6
    for path in files:
        assert (built.path / path).read_bytes() == (warm.path / path).read_bytes(), path


def test_an_entry_with_a_flipped_bit_is_compiled_again(
    toy_bundle: bedplate.Bundle, toy_adapters: dict[str, Path], unit_cache: Path, tmp_path: Path
) -> None:
    """In the header of all the templates, where a hole's offset would move a key."""
    bundle = bedplate.Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "copy"))
    units = Path(shutil.copytree(unit_cache, tmp_path / "units"))
    for entry in units.glob("program-*"):
        whole = entry.read_bytes()
        at = whole.index(b'"facts": {') + 40
        entry.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    bundle.add(toy_adapters["all"], name="again", quantize="none", unit_cache=units)
    again, first = bundle.adapters["again"], bundle.adapters["all"]
    assert again.program.read_bytes() == first.program.read_bytes()
