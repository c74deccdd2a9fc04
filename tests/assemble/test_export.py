"""Programs as single files, in ExecuTorch's own runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from power import PowerCuts
from stock import StockProgram

import bedplate

TOKENS = [5, 9, 13, 2, 7, 11, 3]


@pytest.mark.parametrize("bundle_name", ["toy_bundle", "float_bundle"])
@pytest.mark.parametrize("name", [None, "all"])
def test_one_file_that_wants_no_other(
    name: str | None, bundle_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Its logits are those of the same program beside the foundation."""
    bundle: bedplate.Bundle = request.getfixturevalue(bundle_name)
    one, beside = tmp_path / "one.pte", tmp_path / "beside.pte"
    bundle.export(one, adapter=name, self_contained=name is not None, with_foundation=True)
    bundle.export(beside, adapter=name, self_contained=name is not None)
    expected = StockProgram(beside, bundle.foundation).logits(TOKENS, prefill=4)
    assert torch.equal(StockProgram(one).logits(TOKENS, prefill=4), expected)


def test_an_export_is_whole_whenever_the_power_is_cut(toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.pte").write_bytes(b"old")
    with PowerCuts(tmp_path, lambda tree: tree["x.pte"]) as cuts:
        toy_bundle.export(tmp_path / "x.pte")
        assert cuts.durable() == toy_bundle.base_program.read_bytes()
    assert cuts.seen == {b"old", toy_bundle.base_program.read_bytes()}
