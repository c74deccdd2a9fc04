"""Seed-OSS: Llama with biases of q, k and v by default, and a flag for that of o."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, decoder
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    return replace(
        decoder(config, SEED_OSS),
        qkv_bias=config.flag("attention_bias"),
        output_bias=config.flag("attention_out_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


SEED_OSS = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": True,
    },
    read=_read,
)
