"""Nemotron and Minitron: layer norms whose stored weights count from 1, and an MLP without a gate."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, decoder
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rules
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias")
    return replace(
        decoder(config, NEMOTRON, eps="norm_eps"),
        norm="layer",
        norm_bias=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        gated=False,
    )


NEMOTRON = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    defaults={
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    read=_read,
    norm_offset=1.0,
    rope=Rules(partial=True),
)
