"""Which program uses which constant, and the proof that base and adapters share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from toy_bundle import FOUNDATION, NORM, Q_PROJ, ZEROS, adapter_writer, constant, program

from bedplate.bundle import usage
from bedplate.bundle.fit import program_keys
from bedplate.bundle.ptd import write_ptd
from bedplate.bundle.store import Bundle
from bedplate.bundle.usage import ProgramUse, Sharing
from bedplate.constants import Constant
from bedplate.errors import BundleError


def test_keys_are_found_in_a_program_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "a.pte"
    lookalikes = [b"a" * 64, b"\x40\0\0\0" + b"b" * 64 + b"b\0", b"\x41\0\0\0" + b"c" * 64 + b"\0"]
    path.write_bytes(b"".join([program([NORM]), *lookalikes, program([ZEROS, NORM])]))
    assert program_keys(path) == {NORM.key, ZEROS.key}


def test_constants_are_listed_with_who_holds_and_who_uses_them(bundle: Bundle) -> None:
    rows = {(row.owner, row.name): row for row in usage.constants(bundle)}
    assert len(rows) == 3 + 2 + 2
    norm = rows["foundation", "norm.weight"]
    assert (norm.dtype, norm.shape, norm.nbytes, norm.key) == ("uint8", (8,), 8, NORM.key)
    assert norm.users == ("base", "one", "two")
    assert rows["one", "q_proj.lora_a"].users == ("one",)


def test_sharing_counts_bytes(bundle: Bundle) -> None:
    bundle.base_program.write_bytes(program(FOUNDATION[:2]))
    bundle.adapters["two"].program.write_bytes(program([NORM, constant("a", 20), constant("b", 120)]))
    assert usage.sharing(bundle) == Sharing(
        foundation=24,
        shared=16,
        programs=(
            ProgramUse(name="base", keys=2, from_foundation=16, own=0),
            ProgramUse(name="one", keys=5, from_foundation=24, own=16),
            ProgramUse(name="two", keys=3, from_foundation=8, own=16),
        ),
    )


def test_equal_bytes_under_two_keys_count_once(bundle: Bundle) -> None:
    twin = dataclasses.replace(NORM, key="e" * 64, name="other_norm.weight")
    write_ptd(bundle.foundation, (*FOUNDATION, twin))
    bundle.base_program.write_bytes(program((*FOUNDATION, twin)))
    assert usage.sharing(bundle).foundation == 24
    assert usage.sharing(bundle).programs[0].from_foundation == 24


@pytest.mark.parametrize(
    ("held", "named", "says"),
    [
        ([], [Q_PROJ], r"q_proj\.lora_a .* is held by three, whose program does not name it"),
        (
            [],
            [*FOUNDATION, constant("q_proj.lora_a", 10)],
            r"q_proj\.lora_a .* is named by three, but none",
        ),
        (
            [],
            [constant("?", 99)],
            r"the key [0-9a-f]{64} is named by three, but none of its data files holds it",
        ),
        ([Q_PROJ], [Q_PROJ], r"q_proj\.weight .* is held by the foundation and by three too"),
    ],
    ids=["adapter without effect", "missing in its own files", "missing everywhere", "held twice"],
)
def test_a_key_that_is_not_resolved_once_is_named(
    bundle: Bundle, held: list[Constant], named: list[Constant], says: str
) -> None:
    """The key of another adapter does not count: each program has the foundation and its own file."""
    bundle.add_adapters({"three": adapter_writer(bundle, "three", 30)})
    entry = bundle.adapters["three"]
    own = [constant("q_proj.lora_a", 30)]
    if held:
        write_ptd(entry.weights, [*own, *held])
    entry.program.write_bytes(program([*(named if not held else [*named, *own])]))
    with pytest.raises(BundleError, match=says):
        usage.sharing(bundle)
