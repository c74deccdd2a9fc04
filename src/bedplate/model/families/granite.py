"""Granite 3: four multipliers."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, decoder
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def read_multiplied(config: Fields, family: Family, hidden: str = "intermediate_size") -> ModelSpec:
    """What Granite 3 and 4 have in common. hidden: the field with the width of the MLP."""
    bias = config.flag("attention_bias")
    return replace(
        decoder(config, family, hidden=hidden),
        qkv_bias=bias,
        output_bias=bias,
        embedding_scale=config.factor("embedding_multiplier"),
        residual_scale=config.factor("residual_multiplier"),
        attention_scale=config.factor("attention_multiplier"),
        logit_scale=1 / config.factor("logits_scaling"),
    )


def _read(config: Fields) -> ModelSpec:
    return replace(read_multiplied(config, GRANITE), mlp_bias=config.flag("mlp_bias"))


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    read=_read,
)
