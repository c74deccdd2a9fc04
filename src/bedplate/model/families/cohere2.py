"""Cohere 2 (Command R7B, Command A): parallel halves, and only layers with a window turn q and k."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import SLIDING, Family, decoder, layer_kinds, turning
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rules
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    every = config.count("sliding_window_pattern")
    kinds = layer_kinds(config, lambda index: (index + 1) % every != 0)
    bias = config.flag("attention_bias")
    spec = decoder(config, COHERE2, kinds=kinds, eps="layer_norm_eps")
    return replace(
        spec,
        layers=turning(spec, [kind == SLIDING for kind in kinds]),
        norm="layer",
        norms=("attention_norm",),
        parallel=True,
        qkv_bias=bias,
        output_bias=bias,
        logit_scale=config.factor("logit_scale"),
    )


COHERE2 = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    read=_read,
    modules={"input_layernorm": ("attention_norm",)},
    rope=Rules(interleaved=True),
)
