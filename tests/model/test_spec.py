"""The description of a model: as a bundle keeps it, and what no model can be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_spec import SPEC, table

from bedplate.errors import BundleError
from bedplate.model.decoder import Decoder
from bedplate.runtime.model_spec import decode_spec
from bedplate.spec import (
    LayerSpec,
    LongRope,
    ModelSpec,
    QueryGrowth,
    RotaryRows,
    linear_shapes,
    parameter_shapes,
)

LONG = LongRope(frequencies=(0.5,) * 16, above=32)
OTHERS = {
    "layer norms, parallel": {
        "norm": "layer",
        "norm_bias": True,
        "norms": ("attention_norm",),
        "parallel": True,
    },
    "four norms of each head": {
        "norms": ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"),
        "qk_norm": "head",
    },
    "whole": {"qk_norm": "whole", "gated": False, "activation": "relu2", "mlp_bias": True, "tied_head": True},
    "factors and caps": {
        "embedding_scale": 8.0,
        "residual_scale": 0.25,
        "logit_scale": 0.125,
        "score_cap": 50.0,
        "logit_cap": 30.0,
        "query_growth": QueryGrowth(beta=0.1, original_positions=16),
    },
    "kinds of layers": {
        "ropes": (table(1e4, 32), replace(table(1e6, 32), scale=1.5, long=LONG)),
        "layers": (
            LayerSpec(rope=0, window=8),
            LayerSpec(rope=None, window=None),
            LayerSpec(rope=1, window=None),
        ),
        "rotary": RotaryRows(width=16, interleaved=True),
    },
}


@pytest.fixture(params=[{}, *OTHERS.values()], ids=["plain", *OTHERS])
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return replace(SPEC, **request.param)


def test_what_a_bundle_keeps_gives_it_back(spec: ModelSpec) -> None:
    stored = json.loads(json.dumps(spec.to_dict()))
    assert decode_spec({**stored, "max_context": 2048}, "here") == spec


def test_names_and_shapes_are_those_of_the_decoder(spec: ModelSpec) -> None:
    with torch.device("meta"):
        decoder = Decoder(spec, max_context=1)
    found = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    if spec.tied_head:
        del found["lm_head.weight"]
    assert parameter_shapes(spec) == found
    of_layer = {
        name: tuple(decoder.layers[0].get_submodule(name).weight.shape) for name in linear_shapes(spec)
    }
    assert linear_shapes(spec) == of_layer


FLAWED: dict[str, tuple[dict[str, Any], str]] = {
    "a size of 0": ({"dim": 0}, "'dim' is 0"),
    "a size beyond all": ({"vocab_size": 1 << 25}, "'vocab_size' is 33554432"),
    "text": ({"dim": "64"}, "expected int"),
    "an odd head": ({"head_dim": 31}, "heads of 31"),
    "heads that do not divide": ({"n_kv_heads": 3}, "3 kv heads"),
    "an unknown word": ({"activation": "tanh"}, "found 'tanh'"),
    "an unknown norm": ({"norms": ["other_norm"]}, "found 'other_norm'"),
    "a norm twice": ({"norms": ["attention_norm", "attention_norm"]}, "'norms'"),
    "a norm of a parallel layer": ({"parallel": True}, "a parallel layer"),
    "a bias of an RMS norm": ({"norm_bias": True}, "has no bias"),
    "eps of 1": ({"norm_eps": 1.0}, "'norm_eps'"),
    "an infinite factor": ({"logit_scale": 1e300}, "'logit_scale'"),
    "a factor of 0": ({"residual_scale": 0.0}, "'residual_scale'"),
    "a negative cap": ({"score_cap": -1.0}, "'score_cap'"),
    "a window of 0": ({"layers": [{"rope": 0, "window": 0}]}, "window of 0"),
    "a rope that is not there": ({"layers": [{"rope": 1, "window": None}]}, "rotary embedding 1 of 1"),
    "no layers": ({"layers": []}, "0 layers"),
    "too few frequencies": ({"ropes": [{"frequencies": [1.0], "scale": 1.0, "long": None}]}, "frequencies"),
    "a negative frequency": (
        {"ropes": [{"frequencies": [-1.0] * 16, "scale": 1.0, "long": None}]},
        "frequencies",
    ),
    "no scale": ({"ropes": [{"frequencies": [1.0] * 16, "long": None}]}, "'scale' is missing"),
    "rows that cannot turn": ({"rotary": {"width": 33, "interleaved": False}}, "33 rows"),
    "no growth": ({"query_growth": {"beta": 0.1, "original_positions": 0}}, "'query_growth'"),
}


@pytest.mark.parametrize(("changes", "says"), FLAWED.values(), ids=[*FLAWED])
def test_what_no_model_can_be_is_refused(changes: dict[str, Any], says: str) -> None:
    stored = {**json.loads(json.dumps(SPEC.to_dict())), **changes}
    with pytest.raises(BundleError, match=says) as caught:
        decode_spec(stored, "here")
    assert str(caught.value.where).startswith("here") and caught.value.hint


@pytest.mark.parametrize("field", SPEC.to_dict())
def test_a_field_that_is_missing_is_named(field: str) -> None:
    stored = json.loads(json.dumps(SPEC.to_dict()))
    del stored[field]
    with pytest.raises(BundleError, match=field):
        decode_spec(stored, "here")
