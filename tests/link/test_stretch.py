"""The oracle of compile, pack and link: the whole-graph export of the same model, by ExecuTorch alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eager import eager_decoder
from families import make_toy, save_toy
from stock import StockProgram, export_whole
from toy import BuildToy, save_toy_model, save_toy_tokenizer, toy_config

import bedplate
from bedplate import Bundle
from bedplate.assemble.bundle_structure import adapter_structure
from bedplate.compile.cache import UnitCache
from bedplate.compile.lowering import compile_structure, lowered_units
from bedplate.link.stretch import stretch
from bedplate.link.template import template_of
from bedplate.model.adapter import read_adapter
from bedplate.model.decoder import Decoder
from bedplate.model.masks import WindowMasks
from bedplate.quantize.options import AdapterScheme
from bedplate.runtime.model_spec import read_spec
from bedplate.spec import narrow_windows

pytestmark = pytest.mark.slow

TOKENS = [5, 17, 101, 3, 250, 77, 8, 8, 19, 300, 2, 45]


def test_a_deep_program_equals_whole_graph_export_to_the_bit(build_toy: BuildToy, tmp_path: Path) -> None:
    """Of four layers; its units are those of the toy bundle, which has three."""
    model = tmp_path / "model"
    save_toy_model(model, toy_config(num_hidden_layers=4), seed=4)
    bundle = build_toy(model)
    check_linked(bundle, None, eager_decoder(model, bundle), tmp_path)


@pytest.mark.parametrize(("name", "scheme"), [("all", "none"), ("all8", "8w")])
def test_a_program_with_an_adapter_equals_whole_graph_export_to_the_bit(
    name: str,
    scheme: AdapterScheme,
    toy_bundle: Bundle,
    toy_model: Path,
    toy_adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    check_linked(
        toy_bundle, name, eager_decoder(toy_model, toy_bundle, toy_adapters["all"], scheme), tmp_path
    )


@pytest.mark.parametrize(
    ("family", "variant"),
    [("gemma3_text", "first"), ("smollm3", "first"), ("cohere2", "first"), ("stablelm", "parallel, biases")],
)
def test_layers_of_several_kinds_and_parallel_layers(
    family: str, variant: str, unit_cache: Path, tmp_path: Path
) -> None:
    """Two tables, none, windows; and layers that pass on what both halves read."""
    save_toy(tmp_path / "model", make_toy(family, variant, vocab_size=320))
    save_toy_tokenizer(tmp_path / "model", 320)
    bundle = bedplate.build(
        tmp_path / "model", tmp_path / "toy.bundle", quantize="none", unit_cache=unit_cache
    )
    decoder = eager_decoder(tmp_path / "model", bundle)
    windows = narrow_windows(decoder.spec, decoder.max_context)
    decoder.masks = WindowMasks(windows, decoder.max_context, decoder.max_context)
    check_linked(bundle, None, decoder, tmp_path)


def check_linked(bundle: Bundle, name: str | None, decoder: Decoder, folder: Path) -> None:
    """A program gives the logits of the whole-graph export of `decoder`, to the bit."""
    export_whole(decoder, folder / "whole.pte", max_chunk=decoder.max_context)
    bundle.export(folder / "linked.pte", adapter=name, self_contained=name is not None)
    whole = StockProgram(folder / "whole.pte")
    linked = StockProgram(folder / "linked.pte", bundle.foundation)

    expected = [whole.run("forward", torch.tensor([TOKENS[:7]]), torch.tensor([0]))[0, -1]]
    for position in range(7, len(TOKENS)):
        step = (torch.tensor([[TOKENS[position]]]), torch.tensor([position]))
        expected.append(whole.run("forward", *step)[0, -1])
    assert torch.equal(linked.logits(TOKENS, prefill=7), torch.stack(expected))

    everywhere = whole.run("forward", torch.tensor([TOKENS]), torch.tensor([0]))
    assert torch.equal(linked.run("logits", torch.tensor([TOKENS]), torch.tensor([0])), everywhere)


def test_stretched_units_name_what_the_whole_graph_names(
    toy_bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path
) -> None:
    """Symbol by symbol, and the constants that a structure fixes by key and bytes."""
    spec = read_spec(toy_bundle)
    structure = adapter_structure(toy_bundle, spec, read_adapter(toy_adapters["all"], spec).ranks, "8w")
    units = lowered_units(structure, UnitCache(unit_cache))
    linked = template_of(stretch(units, structure.unit_of_layer), {})
    whole = template_of(compile_structure(structure, spec.layers), {})
    assert linked.holes.keys() == whole.holes.keys()
    assert {name: len(at) for name, at in linked.holes.items()} == {
        name: len(at) for name, at in whole.holes.items()
    }
    held = [
        {name: (constant.key, constant.data.tobytes()) for name, constant in template.fixed.items()}
        for template in (linked, whole)
    ]
    assert held[0] == held[1]
