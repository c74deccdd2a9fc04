"""Gemma 2: norms before and after, capped scores and logits, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bedplate.model.families.common import (
    BEFORE_AND_AFTER,
    NEVER,
    Family,
    check_divides,
    decoder,
    layer_kinds,
)
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rope
from bedplate.spec import ModelSpec

SANDWICH = {
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("attention_output_norm",),
    "pre_feedforward_layernorm": ("mlp_norm",),
    "post_feedforward_layernorm": ("mlp_output_norm",),
}


def read_sandwich(
    config: Fields, family: Family, kinds: Sequence[str], rope: Rope | None = None
) -> ModelSpec:
    """What Gemma 2 and 3 have in common."""
    config.only("use_bidirectional_attention", None, False, hint=NEVER)
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    check_divides(config, "hidden_size", dim, "num_attention_heads", n_heads)
    bias = config.flag("attention_bias")
    return replace(
        decoder(config, family, kinds=kinds, rope=rope, activation="hidden_activation"),
        norms=BEFORE_AND_AFTER,
        qkv_bias=bias,
        output_bias=bias,
        embedding_scale=dim**0.5,
        attention_scale=config.factor("query_pre_attn_scalar") ** -0.5,
        logit_cap=config.factor_or_none("final_logit_softcapping"),
    )


def _read(config: Fields) -> ModelSpec:
    spec = read_sandwich(config, GEMMA2, layer_kinds(config, lambda index: index % 2 == 0))
    return replace(spec, score_cap=config.factor_or_none("attn_logit_softcapping"))


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "use_bidirectional_attention": None,
    },
    read=_read,
    modules=SANDWICH,
    norm_offset=1.0,
)
