"""Helium: neighbouring rows of a head turn together."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, decoder
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rules
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    return replace(
        decoder(config, HELIUM),
        qkv_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


HELIUM = Family(
    model_type="helium",
    architecture="HeliumForCausalLM",
    defaults={
        "num_key_value_heads": 20,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
    },
    read=_read,
    rope=Rules(interleaved=True),
)
