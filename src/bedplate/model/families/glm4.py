"""GLM 4 (0414): norms before and after, and neighbouring rows of the first half of a head turn together."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import BEFORE_AND_AFTER, NORMS_BEFORE, Family, decoder
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rules
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    return replace(decoder(config, GLM4), norms=BEFORE_AND_AFTER, qkv_bias=config.flag("attention_bias"))


GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 0.00000015625,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    read=_read,
    modules={
        **NORMS_BEFORE,
        "post_self_attn_layernorm": ("attention_output_norm",),
        "post_mlp_layernorm": ("mlp_output_norm",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    rope=Rules(partial=True, interleaved=True),
)
