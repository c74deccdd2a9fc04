"""ERNIE 4.5, dense: neighbouring rows of a head turn together, and one flag for all biases."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, decoder
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rules
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    bias = config.flag("use_bias")
    return replace(decoder(config, ERNIE4_5), qkv_bias=bias, output_bias=bias, mlp_bias=bias)


ERNIE4_5 = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    read=_read,
    rope=Rules(interleaved=True),
)
