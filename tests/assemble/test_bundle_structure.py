"""What a manifest says of its recipe and programs is checked before `add` goes by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forged import signed
from toy import BuildToy

from bedplate.api import Bundle
from bedplate.bundle import manifest
from bedplate.errors import BundleError


@pytest.fixture(scope="module")
def bundle(build_toy: BuildToy) -> Path:
    return build_toy(programs=False).path


def edited(bundle: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Bundle:
    """A copy whose manifest was edited, with a digest that fits."""
    copy = Path(shutil.copytree(bundle, folder / "edited.bundle"))
    document = json.loads((copy / manifest.MANIFEST).read_bytes())
    edit(document)
    (copy / manifest.MANIFEST).write_bytes(signed(document))
    return Bundle.open(copy)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda document: document["recipe"].clear(), "the field 'name' is missing"),
        (lambda document: document["recipe"].update(more=1), "unknown field 'more'"),
        (lambda document: document["recipe"].update(rules=None), "expected list, found None"),
        (
            lambda document: document["recipe"].update(adapter="2w"),
            "expected one of 'none', '8w', found '2w'",
        ),
        (
            lambda document: document["recipe"].update(recovery_rank=2**40),
            "recovery rank 1099511627776 is not",
        ),
        (
            lambda document: document["recipe"]["embedding"].update(bits=True),
            "expected one of 4, 8, found True",
        ),
        (
            lambda document: document["recipe"]["embedding"].update(group_size=-32),
            "group size -32 is not supported",
        ),
        (lambda document: document["model"].pop("max_chunk"), "the field 'max_chunk' is missing"),
        (lambda document: document["model"].update(max_chunk=0), "max_chunk=0"),
        (lambda document: document["model"].update(max_context=2**40), "no program has"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    bundle: Path,
    toy_adapters: dict[str, Path],
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], Any],
    says: str,
) -> None:
    wrong = edited(bundle, tmp_path, edit)
    with pytest.raises(BundleError, match=says) as error:
        wrong.add(toy_adapters["all"], name="all", programs=False)
    assert "bundle.json" in str(error.value) and error.value.hint
    assert not wrong.adapters
