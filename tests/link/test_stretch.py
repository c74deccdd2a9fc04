"""The oracle of compile, pack and link: the whole-graph export of the same model, by ExecuTorch alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eager import eager_decoder
from families import make_toy, save_toy
from stock import StockProgram, export_whole
from toy import BuildToy, save_adapter, save_toy_model, save_toy_tokenizer, toy_config

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


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    save_toy_model(folder, toy_config(num_hidden_layers=4), seed=4)
    return folder


@pytest.fixture(scope="module")
def deep_bundle(
    build_toy: BuildToy,
    deep_model: Path,
    toy_bundle: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
    unit_cache: Path,
) -> tuple[Bundle, Path]:
    """Of four layers; its units are those of the toy bundle, which has three."""
    bundle = build_toy(deep_model)
    adapter = save_adapter(tmp_path_factory.mktemp("deep_adapter"), deep_model, seed=5)
    bundle.add(adapter, name="float", quantize="none", unit_cache=unit_cache)
    bundle.add(adapter, name="8bit", quantize="8w", unit_cache=unit_cache)
    return bundle, adapter


@pytest.mark.parametrize("name", ["base", "float", "8bit"])
def test_linked_program_equals_whole_graph_export_to_the_bit(
    name: str, deep_bundle: tuple[Bundle, Path], deep_model: Path, tmp_path: Path
) -> None:
    bundle, adapter = deep_bundle
    decoder = (
        eager_decoder(deep_model, bundle)
        if name == "base"
        else eager_decoder(deep_model, bundle, adapter, "8w" if name == "8bit" else "none")
    )
    check_linked(bundle, None if name == "base" else name, decoder, tmp_path)


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


@pytest.mark.parametrize("quantize", ["8w"])
def test_stretched_units_name_what_the_whole_graph_names(
    quantize: AdapterScheme | None, deep_bundle: tuple[Bundle, Path], unit_cache: Path
) -> None:
    """Symbol by symbol, and the constants that a structure fixes by key and bytes."""
    bundle, adapter = deep_bundle
    spec = read_spec(bundle)
    ranks = read_adapter(adapter, spec).ranks if quantize else {}
    structure = adapter_structure(bundle, spec, ranks, quantize or "none")
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
