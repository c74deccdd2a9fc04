"""Every family: the logits of transformers, from the decoder and from the float reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LENGTH, TOYS, make_toy, save_toy, theirs, variants
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bedplate.model.checkpoint import Checkpoint, checked_tensors, open_checkpoint, tied_names
from bedplate.model.decoder import Decoder
from bedplate.model.families import FAMILIES
from bedplate.model.load import float_decoder, set_parameter
from bedplate.model.reference import head_weight, hidden_states, logits
from bedplate.spec import LayerSpec, ModelSpec, RopeTable, RotaryRows

TOKENS = [int(token) for token in torch.randint(0, 96, (LENGTH,), generator=torch.Generator().manual_seed(1))]


def test_every_family_has_toys() -> None:
    assert TOYS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_names_and_defaults_are_those_of_transformers(family: Any) -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type] == family.architecture
    config = type(AutoConfig.for_model(family.model_type))
    theirs = {field.name: field.default for field in fields(config)}
    for name, default in family.defaults.items():
        if name in theirs:
            assert default == theirs[name] and type(default) is type(theirs[name]), name
        elif name == "rope_theta":
            given = config.default_theta
            assert default == (given["global"] if isinstance(given, dict) else given)
        else:  # what the class sets for configs of earlier versions
            assert name in ("partial_rotary_factor", "rope_local_base_freq", "sliding_window_pattern")
    for name in (
        "head_dim",
        "num_key_value_heads",
        "attention_bias",
        "attention_out_bias",
        "tie_word_embeddings",
    ):
        if name not in family.defaults:
            assert theirs.get(name) in (None, False), name


@pytest.fixture(scope="module", params=variants(), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_toy(folder, make_toy(*request.param))
    return folder


def run(decoder: Decoder, chunks: list[int]) -> Tensor:
    rows, position = [], 0
    with torch.no_grad():
        for length in chunks:
            tokens = torch.tensor([TOKENS[position : position + length]])
            rows.append(decoder(tokens, torch.tensor([position]), torch.zeros(length))[0])
            position += length
    return torch.cat(rows)


def test_equals_transformers(toy: Path) -> None:
    exact = theirs(toy, TOKENS, torch.float64)
    # Toys differ in how much they make of the rounding of float32: as near as transformers itself is near enough.
    near = max(1e-6 * float(exact.abs().max()), 2 * float((theirs(toy, TOKENS) - exact).abs().max()))
    checkpoint = open_checkpoint(toy)
    decoder = float_decoder(checkpoint, max_context=LENGTH)
    whole = run(decoder, [LENGTH])
    decoder.reset_cache()
    chunks = run(decoder, [7, 1, 1, LENGTH - 9])
    (hidden,) = hidden_states(checkpoint, [TOKENS])
    reference = torch.cat(list(logits(hidden, head_weight(checkpoint), checkpoint.spec)))
    for found in (whole, chunks, reference):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=near)


def settings(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """Each thing that the description of a model says beyond that of a plain Llama, and a description without it."""
    plain: dict[str, Any] = {
        "norm": "rms",
        "norm_bias": False,
        "qk_norm": None,
        "qkv_bias": False,
        "output_bias": False,
        "mlp_bias": False,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "attention_scale": spec.head_dim**-0.5,
        "logit_scale": 1.0,
        "score_cap": None,
        "logit_cap": None,
        "query_growth": None,
    }
    if spec.query_growth and spec.query_growth.original_positions >= LENGTH:
        del plain["query_growth"]
    for name, value in plain.items():
        if getattr(spec, name) != value:
            # A norm of the kind "rms" has no bias.
            extra = {"norm_bias": False} if name == "norm" else {}
            yield name, replace(spec, **{name: value}, **extra)
    for norm in spec.norms:
        yield norm, replace(spec, norms=tuple(other for other in spec.norms if other != norm))
    if spec.parallel:
        yield "parallel", replace(spec, parallel=False)
    yield "activation", replace(spec, activation="relu2" if spec.activation != "relu2" else "silu")
    if any(layer.window for layer in spec.layers):
        yield "window", layers(spec, window=None)
        wider = [replace(layer, window=layer.window and layer.window + 1) for layer in spec.layers]
        yield "width of the window", replace(spec, layers=tuple(wider))
    if spec.ropes:
        still = tuple(replace(layer, rope=None) for layer in spec.layers)
        yield "rope", replace(spec, layers=still)
    if any(layer.rope is None for layer in spec.layers) and spec.ropes:
        yield "layers that do not turn", layers(spec, rope=0)
    if len(spec.ropes) > 1:
        yield "two ropes", layers(spec, rope=0)
    if spec.rotary.interleaved and spec.ropes:
        yield "interleaved", replace(spec, rotary=replace(spec.rotary, interleaved=False))
    # With neighbours side by side, the first rows are the first pairs in any case.
    if spec.rotary.width < spec.head_dim and not spec.rotary.interleaved:
        whole = RotaryRows(width=spec.head_dim, interleaved=spec.rotary.interleaved)
        yield "partial", replace(spec, rotary=whole)
    for number, table in enumerate(spec.ropes):
        for what, other in tables(table):
            yield what, replace(spec, ropes=(*spec.ropes[:number], other, *spec.ropes[number + 1 :]))


def tables(table: RopeTable) -> Iterator[tuple[str, RopeTable]]:
    """The same for a rotary embedding."""
    if table.scale != 1:
        yield "scale", replace(table, scale=1.0)
    if 0 in table.frequencies and not table.long:
        every = tuple(frequency or 0.5 for frequency in table.frequencies)
        yield "pairs that do not turn", replace(table, frequencies=every)
    if table.long:
        is_long = table.long.above < LENGTH
        frequencies = table.frequencies if is_long else table.long.frequencies
        yield "lengths", replace(table, long=None, frequencies=frequencies)


def layers(spec: ModelSpec, **changes: Any) -> ModelSpec:
    return replace(spec, layers=tuple(LayerSpec(**{**vars(layer), **changes}) for layer in spec.layers))


def other_decoder(checkpoint: Checkpoint, spec: ModelSpec) -> Decoder:
    """The checkpoint's parameters in a decoder of another description, as far as it has a place for them."""
    checkpoint = copy.copy(checkpoint)
    checkpoint.spec = replace(checkpoint.spec, rotary=spec.rotary)
    decoder = Decoder(spec, max_context=LENGTH).eval()
    have = dict(decoder.named_parameters())
    for name, value in checked_tensors(checkpoint):
        for target in tied_names(name, spec):
            if target in have:
                set_parameter(decoder, target, nn.Parameter(value.float()))
    return decoder


def test_each_setting_of_the_toy_matters(toy: Path) -> None:
    """If one were ignored, the test above would fail."""
    checkpoint = open_checkpoint(toy)
    expected = run(float_decoder(checkpoint, max_context=LENGTH), [LENGTH])
    for what, spec in settings(checkpoint.spec):
        change = float((run(other_decoder(checkpoint, spec), [LENGTH]) - expected).abs().max())
        assert change > 0.01, f"without {what}, logits change by {change}"
