"""Arcee: Llama with an MLP without a gate."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, check_divides, decoder
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    check_divides(config, "hidden_size", dim, "num_attention_heads", n_heads)
    bias = config.flag("attention_bias")
    return replace(
        decoder(config, ARCEE),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        gated=False,
    )


ARCEE = Family(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    defaults={
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    read=_read,
)
