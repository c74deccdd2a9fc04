"""A lowering that is not whole is refused, and what fell out is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_spec import SPEC
from torch import Tensor

from bedplate.compile.stand_in import stand_in_decoder
from bedplate.compile.units import Structure
from bedplate.compile.xnnpack import lower
from bedplate.errors import LoweringError
from bedplate.model.parts import RMSNorm
from bedplate.quantize.recipe import make_recipe


def small_structure() -> Structure:
    spec = replace(
        SPEC,
        dim=32,
        n_heads=1,
        n_kv_heads=1,
        hidden_dim=32,
        vocab_size=32,
        max_positions=32,
        layers=SPEC.layers[:1],
        tied_head=True,
        qkv_bias=False,
        output_bias=False,
    )
    return Structure(spec=spec, recipe=make_recipe("none"), max_context=32, max_chunk=16, ranks={})


def test_an_operator_that_falls_out_of_its_delegate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def usual_norm(self: RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(RMSNorm, "forward", usual_norm)
    structure = small_structure()
    decoder, _ = stand_in_decoder(structure, structure.unit_layers)
    with pytest.raises(LoweringError, match=r"fell out .*mean\.dim of .*norm") as raised:
        lower(decoder, max_chunk=16, symbol_of={})
    assert raised.value.hint
