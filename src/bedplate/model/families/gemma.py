"""Gemma: a larger embedding, and norms whose stored weights count from 1."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import NEVER, Family, decoder
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    config.only("use_bidirectional_attention", None, False, hint=NEVER)
    if config.get("hidden_act") == "gelu":  # transformers: an old name, meant to be the tanh approximation
        config = Fields({**config.values, "hidden_act": "gelu_pytorch_tanh"}, config.where)
    spec, bias = decoder(config, GEMMA), config.flag("attention_bias")
    return replace(spec, qkv_bias=bias, output_bias=bias, embedding_scale=spec.dim**0.5)


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    defaults={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
    },
    read=_read,
    norm_offset=1.0,
)
