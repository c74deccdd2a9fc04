"""Llama 2 and 3, SmolLM2, Falcon 3, and whatever else has its architecture."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, check_divides, decoder
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    check_divides(config, "hidden_size", dim, "num_attention_heads", n_heads)
    bias = config.flag("attention_bias")
    spec = decoder(config, LLAMA)
    return replace(spec, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    read=_read,
    gguf="llama",
    meta_rows=True,
)
